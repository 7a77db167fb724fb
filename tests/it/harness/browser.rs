//! A browser for tests of the console: headless Chromium, driven over WebDriver with clicks and keys. A test fails if
//! the browser blocks a script or a script fails.

use std::io::{BufRead, BufReader, Lines};
use std::process::{ChildStdout, Command, Stdio};
use std::time::Duration;

use reqwest::{Client, Method};
use serde_json::{Value, json};

use crate::harness::process::Process;
use crate::harness::until;

/// The key under which WebDriver returns the id of an element.
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";

/// Keys for [`Browser::press`].
pub(crate) const TAB: &str = "\u{e004}";
pub(crate) const ENTER: &str = "\u{e007}";
pub(crate) const ESCAPE: &str = "\u{e00c}";
pub(crate) const HOME: &str = "\u{e011}";
pub(crate) const LEFT: &str = "\u{e012}";
pub(crate) const RIGHT: &str = "\u{e014}";
pub(crate) const DOWN: &str = "\u{e015}";
pub(crate) const SPACE: &str = " ";

/// The time limit for a change of the page. It is shorter than the limit of [`until`], so that a failed test can print
/// the page.
const TIME_LIMIT: Duration = Duration::from_secs(25);

/// Page sizes in pixels: a desktop's and a phone's.
pub(crate) const DESK: (u32, u32) = (1280, 900);
pub(crate) const PHONE: (u32, u32) = (360, 740);

/// Chromium with one page.
pub(crate) struct Browser {
    client: Client,
    session: String,
    _driver: Process,
    /// Must stay open, because Chromium exits if its output is closed.
    _says: Lines<BufReader<ChildStdout>>,
}

impl Browser {
    /// Opens a page.
    ///
    /// # Panics
    ///
    /// Panics if `chromedriver` or Chromium is missing. Install them with `apt-get install chromium chromium-driver`.
    pub(crate) async fn open(url: &str, size: (u32, u32)) -> Self {
        // If another process takes the port before chromedriver listens on it, chromedriver exits.
        let (driver, says, port) = (0..5).find_map(|_| start_driver()).expect("a chromedriver");
        let client = Client::builder()
            .no_proxy()
            .timeout(Duration::from_secs(60))
            .build()
            .expect("a client");
        let at = format!("http://127.0.0.1:{}/session", port);
        let mut browser = Self {
            client,
            session: at.clone(),
            _driver: driver,
            _says: says,
        };
        let begun = browser.ask(Method::POST, "", capabilities()).await;
        let id = begun["sessionId"].as_str().expect("a session");
        browser.session = format!("{at}/{id}");
        browser.resize(size).await;
        browser.go(url).await;
        browser
    }

    /// Closes the browser, and fails if it has logged an error other than a failed request.
    pub(crate) async fn close(self) {
        let log = self
            .ask(Method::POST, "/se/log", json!({"type": "browser"}))
            .await;
        let errors: Vec<&str> = log
            .as_array()
            .expect("a log")
            .iter()
            .filter(|entry| entry["level"] == "SEVERE" && entry["source"] != "network")
            .map(|entry| entry["message"].as_str().expect("a message"))
            .collect();
        assert!(errors.is_empty(), "{errors:#?}");
        self.ask(Method::DELETE, "", Value::Null).await;
    }

    async fn try_to_ask(&self, method: Method, path: &str, body: Value) -> Result<Value, Value> {
        let mut request = self
            .client
            .request(method, format!("{}{path}", self.session));
        if !body.is_null() {
            request = request.json(&body);
        }
        let answer = request.send().await.expect("chromedriver answers");
        let fine = answer.status().is_success();
        let mut answer: Value = answer.json().await.expect("JSON");
        let value = answer["value"].take();
        if fine { Ok(value) } else { Err(value) }
    }

    async fn ask(&self, method: Method, path: &str, body: Value) -> Value {
        let answer = self.try_to_ask(method, path, body).await;
        answer.unwrap_or_else(|error| panic!("{path}: {}", error["message"]))
    }

    /// Sends a DevTools command, for functions that WebDriver lacks.
    async fn devtools(&self, command: &str, params: Value) {
        let body = json!({"cmd": command, "params": params});
        self.ask(Method::POST, "/goog/cdp/execute", body).await;
    }

    /// Sets the size of the page.
    pub(crate) async fn resize(&self, (width, height): (u32, u32)) {
        let size = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600});
        self.devtools("Emulation.setDeviceMetricsOverride", size)
            .await;
    }

    /// Sets the system's preferred theme.
    pub(crate) async fn system_prefers(&self, theme: &str) {
        let features = json!({"features": [{"name": "prefers-color-scheme", "value": theme}]});
        self.devtools("Emulation.setEmulatedMedia", features).await;
    }

    /// Goes to a page, or to another view of the same page.
    pub(crate) async fn go(&self, url: &str) {
        self.ask(Method::POST, "/url", json!({"url": url})).await;
    }

    /// Loads the page again.
    pub(crate) async fn reload(&self) {
        self.ask(Method::POST, "/refresh", json!({})).await;
    }

    /// The value of a JavaScript expression in the page.
    pub(crate) async fn eval(&self, body: &str) -> Value {
        let script = json!({"script": format!("return {body}"), "args": []});
        self.ask(Method::POST, "/execute/sync", script).await
    }

    /// Waits until a JavaScript expression is truthy in the page.
    pub(crate) async fn until(&self, condition: &str) {
        self.patiently(condition, async || {
            let script = json!({"script": format!("return Boolean({condition})"), "args": []});
            // During navigation there is no document.
            let value = self.try_to_ask(Method::POST, "/execute/sync", script).await;
            value.is_ok_and(|value| value == true)
        })
        .await;
    }

    /// Waits until a condition is true. If it never is, fails with the text of the page.
    async fn patiently(&self, what: &str, condition: impl AsyncFnMut() -> bool) {
        let waited = tokio::time::timeout(TIME_LIMIT, until(what, condition)).await;
        if waited.is_err() {
            let there = self.eval("location.href + '\\n' + document.body.innerText");
            panic!(
                "timed out: {what}; the page is {}",
                there.await.as_str().unwrap_or("?")
            );
        }
    }

    /// Waits until an element that matches a selector shows a text.
    pub(crate) async fn until_text(&self, selector: &str, text: &str) {
        let text = json!(text);
        self.until(&format!(
            "[...document.querySelectorAll({selector:?})].some((e) => e.innerText.includes({text}))"
        ))
        .await;
    }

    /// The visible text of the first element that matches a selector.
    pub(crate) async fn text(&self, selector: &str) -> String {
        let text = self
            .eval(&format!("document.querySelector({selector:?})?.innerText"))
            .await;
        text.as_str().unwrap_or_default().to_owned()
    }

    /// Clicks the first element that matches a selector and begins with a text, as soon as it can be clicked.
    pub(crate) async fn click(&self, selector: &str, text: &str) {
        let what = format!("a click on {selector} {text}");
        let find = format!(
            "return [...document.querySelectorAll({selector:?})].find((e) => e.checkVisibility() && e.textContent.trim().startsWith({}))",
            json!(text)
        );
        self.patiently(&what, async || {
            let script = json!({"script": find, "args": []});
            let found = self.ask(Method::POST, "/execute/sync", script).await;
            let Some(id) = found[ELEMENT].as_str() else {
                return false;
            };
            // The element may have been replaced, or be covered for a moment.
            let click = format!("/element/{id}/click");
            let clicked = self.try_to_ask(Method::POST, &click, json!({})).await;
            clicked.is_ok()
        })
        .await;
    }

    /// Presses keys, one after the other, in the focused element.
    pub(crate) async fn press(&self, keys: &str) {
        let strokes: Vec<Value> = keys
            .chars()
            .flat_map(|key| {
                [
                    json!({"type": "keyDown", "value": key.to_string()}),
                    json!({"type": "keyUp", "value": key.to_string()}),
                ]
            })
            .collect();
        let actions = json!({"actions": [{"type": "key", "id": "keys", "actions": strokes}]});
        self.ask(Method::POST, "/actions", actions).await;
    }

    /// A screenshot, as PNG.
    pub(crate) async fn picture(&self) -> Vec<u8> {
        let picture = self.ask(Method::GET, "/screenshot", Value::Null).await;
        base64(picture.as_str().expect("a picture"))
    }
}

/// A chromedriver, its output, and its port.
fn start_driver() -> Option<(Process, Lines<BufReader<ChildStdout>>, u16)> {
    let mut driver = Command::new("chromedriver");
    driver.arg("--port=0").stdin(Stdio::null());
    driver.stdout(Stdio::piped()).stderr(Stdio::null());
    let mut driver = Process::spawn(driver);
    let mut says = BufReader::new(driver.stdout()).lines();
    let port = says.by_ref().map_while(Result::ok).find_map(|line| {
        let (_, port) = line.split_once("successfully on port ")?;
        port.trim_end_matches('.').parse().ok()
    });
    Some((driver, says, port?))
}

fn capabilities() -> Value {
    // A sandbox needs rights that root does not have in a container, and the browser only opens the console.
    let arguments = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--no-first-run",
        "--no-proxy-server",
        "--lang=en",
        "--force-prefers-reduced-motion",
    ];
    json!({"capabilities": {"alwaysMatch": {
        "browserName": "chrome",
        "goog:chromeOptions": {"args": arguments},
        "goog:loggingPrefs": {"browser": "ALL"},
    }}})
}

fn base64(text: &str) -> Vec<u8> {
    let digits = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut bytes, mut bits, mut held) = (Vec::new(), 0_u32, 0);
    for byte in text.bytes().filter(|byte| *byte != b'=') {
        let digit = digits.iter().position(|digit| *digit == byte);
        let digit = u32::try_from(digit.expect("base64")).expect("small");
        (bits, held) = ((bits << 6 | digit) & 0x3fff, held + 6);
        if held >= 8 {
            held -= 8;
            bytes.push(u8::try_from(bits >> held & 0xff).expect("a byte"));
        }
    }
    bytes
}
