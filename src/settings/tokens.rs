//! Bearer tokens come from the environment or from a file, never from a flag: any user of the machine can read flags in
//! the process list.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use secrecy::{ExposeSecret, SecretString};
use thiserror::Error;
use url::Url;

use super::Listen;
use crate::telemetry::terminal::shown;

/// The minimum length of the console's token, in characters.
const MIN_CONSOLE_TOKEN: usize = 16;

/// The variables that give the tokens, each also with `_FILE`.
pub(crate) const BIGCHAT_TOKEN: &str = "BIGCHAT_SYNC_BIGCHAT_TOKEN";
pub(crate) const OUR_API_TOKEN: &str = "BIGCHAT_SYNC_OUR_API_TOKEN";
const CONSOLE_TOKEN: &str = "BIGCHAT_SYNC_CONSOLE_TOKEN";
const CONSOLE_READ_TOKEN: &str = "BIGCHAT_SYNC_CONSOLE_READ_TOKEN";
const HEARTBEAT_URL: &str = "BIGCHAT_SYNC_HEARTBEAT_URL";

/// The settings that are environment variables, but not flags.
pub(crate) fn token_variables() -> impl Iterator<Item = String> {
    let names = [
        BIGCHAT_TOKEN,
        OUR_API_TOKEN,
        CONSOLE_TOKEN,
        CONSOLE_READ_TOKEN,
        HEARTBEAT_URL,
    ];
    let with_file = |name: &str| [name.to_owned(), format!("{name}_FILE")];
    names.into_iter().flat_map(with_file)
}

/// The secrets that the environment sets: bearer tokens and the heartbeat URL. Clones share them, and a reload replaces
/// them everywhere.
#[derive(Debug, Clone, Default)]
pub struct Tokens {
    /// `BIGCHAT_SYNC_BIGCHAT_TOKEN`, or the content of the file `BIGCHAT_SYNC_BIGCHAT_TOKEN_FILE`.
    pub bigchat: Token,
    /// Likewise `BIGCHAT_SYNC_OUR_API_TOKEN`.
    pub our_api: Token,
    /// Likewise `BIGCHAT_SYNC_CONSOLE_TOKEN`: clients of the console must send it.
    pub console: Token,
    /// Likewise `BIGCHAT_SYNC_CONSOLE_READ_TOKEN`, for read-only access.
    pub console_read: Token,
    /// Likewise `BIGCHAT_SYNC_HEARTBEAT_URL`. It is a secret, because it is all that is needed to report the daemon as
    /// healthy.
    pub heartbeat_url: Token,
    /// The token files that all users of this machine may read or write, as of the start.
    pub exposed_files: Vec<PathBuf>,
}

/// Why a token cannot be used.
#[derive(Debug, Error)]
pub enum TokenError {
    /// Both variables are set.
    #[error("{0} and {0}_FILE are both set; unset one of them")]
    Both(String),
    /// The file cannot be read.
    #[error(
        "cannot read the token file {} named by {variable}_FILE: {source}",
        token_file(path)
    )]
    File {
        /// The variable without `_FILE`.
        variable: String,
        path: PathBuf,
        source: std::io::Error,
    },
    /// The token is empty, or has characters that a header cannot carry.
    #[error(
        "the token from {0} or {0}_FILE is empty, or has white space or other characters that a header cannot contain"
    )]
    Unusable(String),
    /// The console's token is too short.
    #[error(
        "the token from {0} or {0}_FILE has fewer than {MIN_CONSOLE_TOKEN} characters and can be guessed; `openssl rand -hex 16` makes a good one"
    )]
    Short(&'static str),
    /// Only the read token is set, so no client could change anything.
    #[error(
        "{CONSOLE_READ_TOKEN} is set without {CONSOLE_TOKEN}; set both, because otherwise no client could change anything"
    )]
    ReadOnly,
    /// The read token could change everything.
    #[error("{CONSOLE_READ_TOKEN} and {CONSOLE_TOKEN} give the same token; set two different ones")]
    SameToken,
    /// The heartbeat URL is not an HTTP URL.
    #[error(
        "{HEARTBEAT_URL} or {HEARTBEAT_URL}_FILE does not give a URL that begins with https:// or http://"
    )]
    HeartbeatUrl,
    /// A token that was set before is no longer set.
    #[error("{0} and {0}_FILE no longer give a token")]
    Gone(String),
    /// The console would be open to other machines without a token.
    #[error(
        "--listen {0} needs a token for the console: set BIGCHAT_SYNC_CONSOLE_TOKEN_FILE or BIGCHAT_SYNC_CONSOLE_TOKEN, or listen on 127.0.0.1"
    )]
    Open(SocketAddr),
}

/// The path of a token file for an error message. A relative one may be the token itself, set in the wrong variable.
fn token_file(path: &Path) -> String {
    if path.is_absolute() {
        shown(path)
    } else {
        "with a relative path (not shown, because it may be the token itself)".into()
    }
}

impl Tokens {
    /// Reads the tokens from the environment. `variable` returns the value of a variable.
    pub fn read(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self, TokenError> {
        let mut exposed_files = Vec::new();
        let mut token = |name| read_token(name, &variable, &mut exposed_files);
        Ok(Self {
            bigchat: token(BIGCHAT_TOKEN)?.into(),
            our_api: token(OUR_API_TOKEN)?.into(),
            console: token(CONSOLE_TOKEN)?.into(),
            console_read: token(CONSOLE_READ_TOKEN)?.into(),
            heartbeat_url: token(HEARTBEAT_URL)?.into(),
            exposed_files,
        })
    }

    /// Whether the console may be served at that address.
    pub fn allow(&self, listen: Listen) -> Result<(), TokenError> {
        let (console, console_read) = (self.console.get(), self.console_read.get());
        allow(console.as_ref(), console_read.as_ref(), listen)
    }

    /// Reads the tokens again. `variable` returns the value of an environment variable. If a token cannot be read, the
    /// old one stays in use. Returns the variable of each new token, or why the old one stays.
    pub fn reload(
        &self,
        variable: impl Fn(&str) -> Option<OsString>,
        listen: Listen,
    ) -> Vec<Result<&'static str, TokenError>> {
        let reload = |name: &'static str, old: &Token| {
            let new = read_token(name, &variable, &mut Vec::new())?;
            match (new, old.get()) {
                (None, None) => Ok(None),
                (None, Some(_)) => Err(TokenError::Gone(name.into())),
                (Some(new), _) if old.is(&new) => Ok(None),
                (Some(new), _) => {
                    match name {
                        CONSOLE_TOKEN => {
                            allow(Some(&new), self.console_read.get().as_ref(), listen)?;
                        }
                        CONSOLE_READ_TOKEN => {
                            allow(self.console.get().as_ref(), Some(&new), listen)?;
                        }
                        _ => {}
                    }
                    old.set(new);
                    Ok(Some(name))
                }
            }
        };
        let reloaded = [
            reload(BIGCHAT_TOKEN, &self.bigchat),
            reload(OUR_API_TOKEN, &self.our_api),
            reload(CONSOLE_TOKEN, &self.console),
            reload(CONSOLE_READ_TOKEN, &self.console_read),
            reload(HEARTBEAT_URL, &self.heartbeat_url),
        ];
        reloaded.into_iter().filter_map(Result::transpose).collect()
    }
}

/// The token in a variable or its file. A file that all users of this machine may read or write is added to
/// `exposed_files`.
fn read_token(
    name: &str,
    variable: impl Fn(&str) -> Option<OsString>,
    exposed_files: &mut Vec<PathBuf>,
) -> Result<Option<SecretString>, TokenError> {
    let text = match (variable(name), variable(&format!("{name}_FILE"))) {
        (None, None) => return Ok(None),
        (Some(_), Some(_)) => return Err(TokenError::Both(name.into())),
        (Some(token), None) => token.to_string_lossy().into_owned(),
        (None, Some(path)) => {
            let path = PathBuf::from(path);
            let (text, is_exposed) = read_file(&path).map_err(|source| TokenError::File {
                variable: name.into(),
                path: path.clone(),
                source,
            })?;
            exposed_files.extend(is_exposed.then_some(path));
            text
        }
    };
    let token = text.trim();
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(TokenError::Unusable(name.into()));
    }
    let token = SecretString::from(token);
    if name == HEARTBEAT_URL && heartbeat_url(&token).is_none() {
        return Err(TokenError::HeartbeatUrl);
    }
    Ok(Some(token))
}

/// The heartbeat URL, if the value is a URL.
pub(crate) fn heartbeat_url(text: &SecretString) -> Option<Url> {
    let url = Url::parse(text.expose_secret()).ok()?;
    (matches!(url.scheme(), "http" | "https") && url.has_host()).then_some(url)
}

fn allow(
    console: Option<&SecretString>,
    console_read: Option<&SecretString>,
    listen: Listen,
) -> Result<(), TokenError> {
    let Listen::At(address) = listen else {
        return Ok(());
    };
    for (name, token) in [(CONSOLE_TOKEN, console), (CONSOLE_READ_TOKEN, console_read)] {
        if token.is_some_and(|token| token.expose_secret().len() < MIN_CONSOLE_TOKEN) {
            return Err(TokenError::Short(name));
        }
    }
    match (console, console_read) {
        (None, Some(_)) => Err(TokenError::ReadOnly),
        (None, None) if !address.ip().is_loopback() => Err(TokenError::Open(address)),
        (Some(all), Some(read)) if all.expose_secret() == read.expose_secret() => {
            Err(TokenError::SameToken)
        }
        _ => Ok(()),
    }
}

/// The current bearer token, if any. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Token(Arc<RwLock<Option<SecretString>>>);

impl Token {
    pub fn get(&self) -> Option<SecretString> {
        let token = self.0.read().unwrap_or_else(PoisonError::into_inner);
        token.clone()
    }

    /// Whether this is the current token.
    fn is(&self, token: &SecretString) -> bool {
        self.get()
            .is_some_and(|now| now.expose_secret() == token.expose_secret())
    }

    fn set(&self, token: SecretString) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(token);
    }
}

impl From<Option<SecretString>> for Token {
    fn from(token: Option<SecretString>) -> Self {
        Self(Arc::new(RwLock::new(token)))
    }
}

/// The content of a token file, and whether all users of this machine may read or write it.
fn read_file(path: &Path) -> std::io::Result<(String, bool)> {
    let mut file = File::open(path)?;
    let metadata = file.metadata()?;
    let is_exposed = metadata.is_file() && metadata.permissions().mode() & 0o006 != 0;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    Ok((text, is_exposed))
}

#[cfg(test)]
mod tests {
    use super::super::DEFAULT_LISTEN;
    use super::*;

    /// A token comes from one source, and is never shown.
    #[test]
    fn token_has_one_source() {
        let set = |pairs: &'static [(&str, &str)]| {
            Tokens::read(|name| {
                pairs
                    .iter()
                    .find(|(key, _)| *key == name)
                    .map(|(_, value)| value.into())
            })
        };
        let tokens = set(&[("BIGCHAT_SYNC_OUR_API_TOKEN", " s3cret\n")]).expect("a token");
        assert!(tokens.our_api.is(&"s3cret".into()));
        assert!(tokens.bigchat.get().is_none());
        assert!(!format!("{tokens:?}").contains("s3cret"));
        let both = set(&[
            ("BIGCHAT_SYNC_BIGCHAT_TOKEN", "a"),
            ("BIGCHAT_SYNC_BIGCHAT_TOKEN_FILE", "b"),
        ]);
        assert!(matches!(both, Err(TokenError::Both(_))));
        assert!(matches!(
            set(&[("BIGCHAT_SYNC_BIGCHAT_TOKEN", "")]),
            Err(TokenError::Unusable(_))
        ));
        assert!(matches!(
            set(&[("BIGCHAT_SYNC_BIGCHAT_TOKEN_FILE", "/does/not/exist")]),
            Err(TokenError::File { .. })
        ));
    }

    /// A reload replaces the tokens that can be used; the others stay as they are.
    #[test]
    fn reload_replaces_usable_tokens() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("token");
        let good = "a-token-that-cannot-be-guessed";
        for name in [BIGCHAT_TOKEN, OUR_API_TOKEN, CONSOLE_TOKEN] {
            let variable = |asked: &str| {
                (asked == format!("{name}_FILE")).then(|| file.clone().into_os_string())
            };
            std::fs::write(&file, good).expect("a file");
            let tokens = Tokens::read(variable).expect("a token");
            let [used] = [&tokens.bigchat, &tokens.our_api, &tokens.console]
                .into_iter()
                .filter(|token| token.get().is_some())
                .collect::<Vec<_>>()[..]
            else {
                panic!("one of them")
            };
            let reload = || tokens.reload(variable, Listen::At(DEFAULT_LISTEN));
            assert!(reload().is_empty(), "nothing is new");
            for bad in ["", " \n", "two words", "ä"] {
                std::fs::write(&file, bad).expect("a file");
                assert!(
                    matches!(reload()[..], [Err(TokenError::Unusable(_))]),
                    "{bad:?}"
                );
                assert!(used.is(&good.into()), "{bad:?}");
            }
            std::fs::remove_file(&file).expect("a file");
            assert!(matches!(reload()[..], [Err(TokenError::File { .. })]));
            let gone = tokens.reload(|_| None, Listen::Off);
            assert!(matches!(gone[..], [Err(TokenError::Gone(_))]));
            assert!(used.is(&good.into()));
            std::fs::write(&file, "another-token-that-cannot-be-guessed\n").expect("a file");
            assert!(matches!(reload()[..], [Ok(new)] if new == name));
            assert!(used.is(&"another-token-that-cannot-be-guessed".into()));
            std::fs::write(&file, "short").expect("a file");
            let short = reload();
            match name {
                CONSOLE_TOKEN => assert!(matches!(short[..], [Err(TokenError::Short(_))])),
                _ => assert!(matches!(short[..], [Ok(_)])),
            }
        }
    }

    /// The tokens from these variables, or why they cannot be used.
    fn console_tokens(pairs: &[(&str, &str)]) -> Result<(), TokenError> {
        let variable = |name: &str| {
            let pair = pairs.iter().find(|(set, _)| *set == name);
            pair.map(|(_, value)| OsString::from(value))
        };
        Tokens::read(variable)?.allow(Listen::At(DEFAULT_LISTEN))
    }

    #[test]
    fn read_token_needs_another_full_one() {
        let (one, other) = ("0123456789abcdef", "fedcba9876543210");
        let both = |all, read| console_tokens(&[(CONSOLE_TOKEN, all), (CONSOLE_READ_TOKEN, read)]);
        both(one, other).expect("two tokens");
        assert!(matches!(both(one, one), Err(TokenError::SameToken)));
        assert!(matches!(
            both(one, "short"),
            Err(TokenError::Short(CONSOLE_READ_TOKEN))
        ));
        assert!(matches!(
            console_tokens(&[(CONSOLE_READ_TOKEN, one)]),
            Err(TokenError::ReadOnly)
        ));
    }

    #[test]
    fn heartbeat_url_is_a_url() {
        for bad in ["hc.example/uuid", "ftp://hc.example/uuid", "https://"] {
            let read = console_tokens(&[(HEARTBEAT_URL, bad)]);
            let error = read.expect_err(bad).to_string();
            assert!(error.contains(HEARTBEAT_URL), "{error}");
            assert!(!error.contains("uuid"), "{error}");
        }
        console_tokens(&[(HEARTBEAT_URL, "https://hc.example/uuid")]).expect("a URL");
    }

    /// A token that is set only after the start is used from the next reload on.
    #[test]
    fn token_added_after_the_start() {
        let tokens = Tokens::default();
        let given = |name: &str| (name == CONSOLE_TOKEN).then(|| "0123456789abcdef".into());
        assert!(matches!(
            tokens.reload(given, Listen::Off)[..],
            [Ok(CONSOLE_TOKEN)]
        ));
        assert!(tokens.console.is(&"0123456789abcdef".into()));
        assert!(!format!("{tokens:?}").contains("0123456789abcdef"));
    }
}
