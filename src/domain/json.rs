//! A lenient JSON splitter: it separates the values of an object or list without parsing them, so that an invalid value
//! does not affect the others. `NaN`, a number out of range, an unpaired surrogate or a byte in another encoding costs
//! only the value that contains it.

use std::borrow::Cow;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use thiserror::Error;

/// Why JSON cannot be split.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Malformed {
    #[error("expected {0}")]
    Expected(&'static str),
    /// A bracket, colon or comma is missing.
    #[error("malformed at byte {0}")]
    At(usize),
    #[error("truncated")]
    Truncated,
    /// Reported only for a requested field.
    #[error("duplicate field `{0}`")]
    Duplicate(&'static str),
}

type Result<T> = std::result::Result<T, Malformed>;

/// The raw values of the named fields of an object.
pub fn fields<'a, const N: usize>(
    object: &'a str,
    names: [&'static str; N],
) -> Result<[Option<&'a str>; N]> {
    let mut values = [None; N];
    let mut duplicate = None;
    all_fields(object, |name, value| {
        if let Some(index) = names.iter().position(|known| *known == name)
            && values[index].replace(value).is_some()
        {
            duplicate = Some(Malformed::Duplicate(names[index]));
        }
    })?;
    duplicate.map_or(Ok(values), Err)
}

/// Calls `each` with the name and the raw value of every field of an object.
pub fn all_fields<'a>(object: &'a str, mut each: impl FnMut(&str, &'a str)) -> Result<()> {
    let mut scanner = Scanner::open(object, b'{', "an object")?;
    while !scanner.closes(b'}')? {
        let name = scanner.value()?;
        scanner.expect(b':')?;
        each(&unescaped(name), scanner.value()?);
    }
    scanner.end()
}

/// Calls `each` with the raw JSON of every item of a list. It collects none of them, since a hostile list may have
/// millions.
pub fn items<'a>(list: &'a str, mut each: impl FnMut(&'a str)) -> Result<()> {
    let mut scanner = Scanner::open(list, b'[', "a list")?;
    while !scanner.closes(b']')? {
        each(scanner.value()?);
    }
    scanner.end()
}

/// A 64-bit integer in any JSON spelling: `5.0` and `5e0` are 5, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Integer(pub i64);

impl<'de> Deserialize<'de> for Integer {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        /// From here on, floats cannot represent every integer.
        const EXACT: f64 = (1_u64 << 53) as f64;
        let number = serde_json::Number::deserialize(deserializer)?;
        let whole = |float: &f64| float.fract() == 0.0 && float.abs() < EXACT;
        let from_float = || number.as_f64().filter(whole).map(|float| float as i64);
        number
            .as_i64()
            .or_else(from_float)
            .map(Self)
            .ok_or_else(|| D::Error::custom(format!("{number} is not a 64-bit integer")))
    }
}

fn unescaped(name: &str) -> Cow<'_, str> {
    let plain = name
        .strip_prefix('"')
        .and_then(|name| name.strip_suffix('"'));
    match plain {
        Some(plain) if !plain.contains('\\') => Cow::Borrowed(plain),
        // An invalid name matches no field.
        _ => serde_json::from_str(name).map_or(Cow::Borrowed(name), Cow::Owned),
    }
}

struct Scanner<'a> {
    text: &'a str,
    at: usize,
    first: bool,
}

impl<'a> Scanner<'a> {
    fn open(text: &'a str, bracket: u8, expected: &'static str) -> Result<Self> {
        let mut scanner = Self {
            text,
            at: 0,
            first: true,
        };
        scanner.skip_space();
        match scanner.peek() {
            Some(byte) if byte == bracket => {
                scanner.at += 1;
                Ok(scanner)
            }
            _ => Err(Malformed::Expected(expected)),
        }
    }

    /// Whether the bracket closes here. A trailing comma is accepted.
    fn closes(&mut self, bracket: u8) -> Result<bool> {
        self.skip_space();
        if !std::mem::take(&mut self.first) && self.peek() != Some(bracket) {
            self.expect(b',')?;
            self.skip_space();
        }
        let closes = self.peek() == Some(bracket);
        self.at += usize::from(closes);
        Ok(closes)
    }

    fn expect(&mut self, byte: u8) -> Result<()> {
        self.skip_space();
        match self.peek() {
            Some(found) if found == byte => {
                self.at += 1;
                Ok(())
            }
            Some(_) => Err(Malformed::At(self.at)),
            None => Err(Malformed::Truncated),
        }
    }

    fn end(mut self) -> Result<()> {
        self.skip_space();
        self.peek().map_or(Ok(()), |_| Err(Malformed::At(self.at)))
    }

    /// The raw text of the next value, valid or not.
    fn value(&mut self) -> Result<&'a str> {
        self.skip_space();
        let start = self.at;
        match self.peek() {
            Some(b'"') => self.string()?,
            Some(b'{' | b'[') => self.nested()?,
            _ => self.scalar()?,
        }
        Ok(self.text[start..self.at].trim_end())
    }

    fn scalar(&mut self) -> Result<()> {
        let rest = &self.text.as_bytes()[self.at..];
        let end = rest
            .iter()
            .position(|byte| matches!(byte, b',' | b']' | b'}' | b':' | b'"' | b'[' | b'{'));
        self.at += end.ok_or(Malformed::Truncated)?;
        Ok(())
    }

    fn string(&mut self) -> Result<()> {
        self.at += 1;
        loop {
            match self.peek() {
                Some(b'"') => break,
                Some(b'\\') => self.at += 2,
                Some(_) => self.at += 1,
                None => return Err(Malformed::Truncated),
            }
        }
        self.at += 1;
        Ok(())
    }

    fn nested(&mut self) -> Result<()> {
        let mut open = Vec::new();
        loop {
            match self.peek() {
                Some(b'"') => {
                    self.string()?;
                    continue;
                }
                Some(b'{') => open.push(b'}'),
                Some(b'[') => open.push(b']'),
                Some(bracket @ (b'}' | b']')) => {
                    if open.pop() != Some(bracket) {
                        return Err(Malformed::At(self.at));
                    }
                }
                Some(_) => {}
                None => return Err(Malformed::Truncated),
            }
            self.at += 1;
            if open.is_empty() {
                return Ok(());
            }
        }
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn skip_space(&mut self) {
        let rest = &self.text.as_bytes()[self.at..];
        let space = |byte: &&u8| matches!(byte, b' ' | b'\t' | b'\n' | b'\r');
        self.at += rest.iter().take_while(space).count();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn list(text: &str) -> Result<Vec<&str>> {
        let mut all = Vec::new();
        items(text, |item| all.push(item))?;
        Ok(all)
    }

    #[test]
    fn an_invalid_value_costs_no_other() {
        for odd in [
            "NaN",
            "-Infinity",
            "1e400",
            r#""\ud800""#,
            r#""\xe4""#,
            "\"a\tb\"",
            "'a'",
            "undefined",
            "01",
            "",
            r#"{"a":NaN}"#,
            &format!("{}{}", "[".repeat(100_000), "]".repeat(100_000)),
        ] {
            let text = format!(r#"[{{"a":1}}, {odd} ,"]",[]]"#);
            assert_eq!(list(&text), Ok(vec![r#"{"a":1}"#, odd, r#""]""#, "[]"]));
            let object = format!(r#" {{ "a" : {odd} , "\u0062":2 , "c":"\"}}" }} "#);
            assert_eq!(
                fields(&object, ["b", "a", "d"]),
                Ok([Some("2"), Some(odd), None])
            );
        }
    }

    #[test]
    fn malformed_json_gives_the_reason() {
        for (text, why) in [
            ("", Malformed::Expected("a list")),
            ("{}", Malformed::Expected("a list")),
            ("[1", Malformed::Truncated),
            ("[1,", Malformed::Truncated),
            ("[\"1]", Malformed::Truncated),
            ("[\"1\\", Malformed::Truncated),
            ("[{]]", Malformed::At(2)),
            ("[1 \"2\"]", Malformed::At(3)),
            ("[1] 2", Malformed::At(4)),
        ] {
            assert_eq!(list(text), Err(why), "{text}");
        }
        assert_eq!(
            fields(r#"{"a":1,"a":1}"#, ["a"]),
            Err(Malformed::Duplicate("a"))
        );
        assert_eq!(fields(r#"{"b":1,"b":1}"#, ["a"]), Ok([None]));
    }

    #[test]
    fn integers_in_any_spelling() {
        let read = |text: &str| serde_json::from_str(text).ok().map(|Integer(value)| value);
        for (text, value) in [
            ("5", Some(5)),
            ("5.0", Some(5)),
            ("5e0", Some(5)),
            ("1.795384805e9", Some(1_795_384_805)),
            ("-0", Some(0)),
            ("9223372036854775807", Some(i64::MAX)),
            ("9223372036854775808", None),
            ("1e300", None),
            ("5.5", None),
            ("\"5\"", None),
            ("null", None),
        ] {
            assert_eq!(read(text), value, "{text}");
        }
    }

    proptest! {
        #[test]
        fn valid_json_is_split_correctly(
            values in proptest::collection::vec(("[a-z\"\\\\{}\\[\\],: ]{0,6}", any::<i64>()), 0..6),
            pretty in any::<bool>(),
        ) {
            let values: Vec<Value> = values
                .into_iter()
                .map(|(text, number)| serde_json::json!([text, { "b": number, "a": text }]))
                .collect();
            let json = if pretty {
                serde_json::to_string_pretty(&values)
            } else {
                serde_json::to_string(&values)
            };
            let json = json.expect("JSON");
            let read: Vec<Value> = list(&json)
                .expect("a list")
                .into_iter()
                .map(|item| serde_json::from_str(item).expect("JSON"))
                .collect();
            prop_assert_eq!(read, values);
        }

        #[test]
        fn arbitrary_text_never_panics(text in "[\\[\\]{}\",:\\\\ a1é]{0,24}") {
            let list: Vec<_> = list(&text).unwrap_or_default();
            prop_assert!(list.len() <= text.len());
            if let Ok([Some(value)]) = fields(&text, ["a"]) {
                prop_assert!(text.contains(value));
            }
        }
    }
}
