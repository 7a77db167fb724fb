//! The console's page. All its files are part of the program.

use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;

const HTML: &str = "text/html; charset=utf-8";
const STYLE: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const PICTURE: &str = "image/svg+xml";

macro_rules! file {
    ($name:literal) => {
        (concat!("/", $name), include_str!(concat!("page/", $name)))
    };
}

/// The files, each with its content type.
const FILES: [((&str, &str), &str); 15] = [
    (("/", include_str!("page/index.html")), HTML),
    (file!("console.css"), STYLE),
    (file!("icon.svg"), PICTURE),
    (file!("theme.js"), SCRIPT),
    (file!("console.js"), SCRIPT),
    (file!("chart.js"), SCRIPT),
    (file!("daemon.js"), SCRIPT),
    (file!("resolutions.js"), SCRIPT),
    (file!("dom.js"), SCRIPT),
    (file!("failed.js"), SCRIPT),
    (file!("format.js"), SCRIPT),
    (file!("overview.js"), SCRIPT),
    (file!("parts.js"), SCRIPT),
    (file!("pause.js"), SCRIPT),
    (file!("talk.js"), SCRIPT),
];

/// The page and its files. They contain no data of the daemon, so they need no token; the login is on the page.
pub(super) fn router<S: Clone + Send + Sync + 'static>() -> Router<S> {
    FILES
        .iter()
        .fold(Router::new(), |router, ((path, text), kind)| {
            router.route(
                path,
                get(move || async move { ([(CONTENT_TYPE, *kind)], *text) }),
            )
        })
}

#[cfg(test)]
mod tests {
    use crate::domain::event::EventKind;
    use crate::journal::UNREADABLE;

    #[test]
    fn each_kind_has_a_color() {
        let css = include_str!("page/console.css");
        for kind in EventKind::ALL
            .map(EventKind::name)
            .into_iter()
            .chain([UNREADABLE])
        {
            let rule = format!(
                ":is(.kind, .swatch, rect.received).{},\n.entry[data-kind=\"{kind}\"] {{\n  --c: ",
                kind.to_lowercase()
            );
            assert!(css.contains(&rule), "console.css has no {rule}");
        }
    }

    #[test]
    fn scripts_know_which_kinds_are_messages() {
        let messages = EventKind::ALL.into_iter().filter(|kind| kind.is_message());
        let names: Vec<_> = messages.map(EventKind::name).collect();
        let line = format!("isMessage = (name) => {names:?}.includes(name);");
        assert!(
            include_str!("page/parts.js").contains(&line),
            "parts.js has no {line}"
        );
    }
}
