//! The console in a real browser: everything is readable, with any numbers and characters, and on a phone.

use crate::harness::journal::{CONVERSATION, dead_letter, failed_message, spent};
use crate::harness::{Daemon, Test, run_test};
use bigchat_sync::settings::Tokens;
use bigchat_sync::simulator::bigchat::raw;
use bigchat_sync::simulator::event::{message, start};
use bigchat_sync::simulator::fault::status;
use serde_json::{Value, json};

use crate::harness::browser::{Browser, DESK, PHONE};

struct Desk {
    daemon: Daemon,
    url: String,
    browser: Browser,
}

impl Desk {
    /// Opens the console of a journal that was filled by this SQL.
    async fn over(t: &Test, sql: &str) -> Self {
        t.fill(sql).await;
        Self::new(t).await
    }

    async fn new(t: &Test) -> Self {
        let (daemon, url) = t.start_listening(Tokens::default());
        let browser = Browser::open(&url, DESK).await;
        browser.until_text("h1", "").await;
        Self {
            daemon,
            url,
            browser,
        }
    }

    async fn go(&self, view: &str, there: &str) {
        self.browser.go(&format!("{}/{view}", self.url)).await;
        let there = format!("document.querySelector({there:?})");
        self.browser.until(&there).await;
    }

    /// The texts of all elements that match a selector.
    async fn texts(&self, selector: &str) -> Value {
        let all = format!("[...document.querySelectorAll({selector:?})]");
        self.browser
            .eval(&format!("{all}.map((e) => e.textContent)"))
            .await
    }

    /// Stores a picture in the directory `CONSOLE_PICTURES`, if that is set.
    async fn picture(&self, name: &str) {
        if let Ok(directory) = std::env::var("CONSOLE_PICTURES") {
            let path = format!("{directory}/{name}.png");
            std::fs::write(path, self.browser.picture().await).expect("a file");
        }
    }

    async fn done(self) {
        self.browser.close().await;
        self.daemon.stop().await;
    }
}

/// For each element that matches a selector, its text, or `false` if it is not readable.
fn shown(selector: &str) -> String {
    let all = format!("[...document.querySelectorAll({selector:?})]");
    format!("{all}.map((e) => e.checkVisibility() && e.innerText)")
}

/// The labels of the chart's vertical axis for this many events a minute, and how many of all labels are cut off.
async fn axis(browser: &Browser, received: i64, delivered: i64) -> (Vec<String>, Value) {
    let kinds = ["MESSAGE", "START", "TRANSFER", "END", "UNREADABLE"];
    let activity = json!({"from": 0, "to": 59, "step": 1, "kinds": kinds, "minutes": [
        {"minute": 7, "kind": "MESSAGE", "received": received, "delivered": delivered, "failed": 0},
    ]});
    let drawn = browser
        .eval(&format!(
            "import('/chart.js').then((chart) => {{
                chart.draw({activity});
                document.querySelector('#chart').scrollIntoView({{ block: 'center' }});
                const picture = document.querySelector('#chart > svg');
                const edge = picture.getBoundingClientRect();
                const labels = [...picture.querySelectorAll('text.axis')];
                const out = labels.filter((label) => {{
                    const {{ left, right }} = label.getBoundingClientRect();
                    return left < edge.left || right > edge.right;
                }});
                const marks = labels.filter((label) => label.getAttribute('text-anchor') === 'end');
                return [marks.map((label) => label.textContent), out.map((label) => label.textContent)];
            }})"
        ))
        .await;
    let labels = serde_json::from_value(drawn[0].clone()).expect("labels");
    (labels, drawn[1].clone())
}

#[tokio::test]
#[ignore = "needs chromium"]
async fn chart_axis_of_any_magnitude() {
    run_test(async |t| {
        let desk = Desk::over(t, "").await;
        desk.go("#/?hours=1", "#chart > svg").await;
        for size in [DESK, PHONE] {
            desk.browser.resize(size).await;
            for (received, delivered, top) in [
                (0, 0, "4"),
                (1, 0, "1"),
                (999, 0, "1,000"),
                (1_000, 1_000, "1,000"),
                (0, 5_000, "6,000"),
                (12_345, 0, "16,000"),
                (999_999, 0, "1M"),
                (1_234_567, 0, "1.6M"),
                (9_007_199_254_740_991, 0, "10,000T"),
            ] {
                let (labels, out) = axis(&desk.browser, received, delivered).await;
                assert_eq!(out, json!([]), "{received} {size:?}");
                assert_eq!(
                    labels.last().expect("labels"),
                    top,
                    "{received}: {labels:?}"
                );
                // Each mark is one step above the one below, and none is rounded.
                if received == 1 {
                    assert_eq!(labels, ["0", "0.25", "0.5", "0.75", "1"]);
                }
                if (received, size) == (12_345, PHONE) {
                    desk.picture("axis").await;
                }
            }
        }
        desk.done().await;
    })
    .await;
}

#[tokio::test]
#[ignore = "needs chromium"]
async fn figures_of_any_magnitude() {
    run_test(async |t| {
        let desk = Desk::over(t, "").await;
        desk.go("", "#legend li").await;
        for size in [DESK, (900, 900), PHONE] {
            desk.browser.resize(size).await;
            for number in ["999", "12,345", "1,234,567", "123,456,789"] {
                let out = desk
                    .browser
                    .eval(&format!(
                        "(() => {{
                        const all = document.querySelectorAll('.figure b, .strip b, .legend b');
                        const numbers = [...all];
                        const before = numbers.map((b) => b.textContent);
                        for (const b of numbers) b.textContent = {number:?};
                        const near = numbers.flatMap((b) => [b, ...b.parentElement.children]);
                        const right = (e) => e.getBoundingClientRect().right;
                        const box = (e) => e.closest('.node, .strip > div, .card');
                        const out = near.filter((e) => right(e) > right(box(e)) + 0.5);
                        const texts = out.map((e) => e.textContent);
                        numbers.forEach((b, index) => (b.textContent = before[index]));
                        const count = numbers.length;
                        return count < 8 ? [`${{count}} numbers`] : texts;
                    }})()"
                    ))
                    .await;
                assert_eq!(out, json!([]), "{number} {size:?}");
            }
        }
        desk.done().await;
    })
    .await;
}

#[tokio::test]
#[ignore = "needs chromium"]
async fn characters_without_glyph_are_marked() {
    let shown = [
        ("before\0after", "beforeU+0000after"),
        ("\0", "U+0000"),
        ("\u{1b}[2J\u{7f}\u{85}", "U+001B[2JU+007FU+0085"),
        ("pay \u{202e}001\u{202c} now", "pay U+202E001U+202C now"),
        (
            "\u{2066}\u{200b}\u{feff}\u{3164}",
            "U+2066U+200BU+FEFFU+3164",
        ),
        ("a\rb\r\nc\td", "aU+000Db\r\nc\td"),
        (
            "👩\u{200d}💻 ❤\u{fe0f} می\u{200c}خواهم",
            "👩\u{200d}💻 ❤\u{fe0f} می\u{200c}خواهم",
        ),
        ("<b>\u{2028}&amp;", "<b>U+2028&amp;"),
    ];
    let events = (1..).zip(shown);
    let events: String = events
        .map(|(id, (text, _))| failed_message(id, text, "no\u{202e} good"))
        .collect();
    run_test(async |t| {
        let desk = Desk::over(
            t,
            &format!(
                "{CONVERSATION}{events}
         INSERT INTO advisors
         VALUES (1, 7, 'Ann\u{202e}' || char(27) || 'nnA', 'a\u{2067}@x.test');
         UPDATE conversations
         SET first_advisor = 7, details = 'read', chat_agent = 'x', chat_id = 'y' WHERE id = 100;
         {}",
                dead_letter(
                    50,
                    "NULL",
                    "UNREADABLE",
                    "{\"message\":\"\\ud800\\u0000\u{202e}\"}",
                    "",
                    0
                )
            ),
        )
        .await;
        let expected: Vec<&str> = shown.iter().map(|(_, shown)| *shown).collect();
        desk.go("#/conversations/100", ".words").await;
        assert_eq!(desk.texts(".words").await, json!(expected));
        desk.picture("special").await;
        desk.browser.system_prefers("dark").await;
        desk.picture("special-dark").await;
        desk.go("#/failed?reason=no%E2%80%AE%20good", ".says").await;
        assert_eq!(desk.texts(".says").await, json!(expected));
        let invisible = concat!(
            r"/[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069]/",
            ".test(document.title + document.body.textContent)"
        );
        for (view, there, text) in [
            ("#/conversations/100", "aside", "AnnU+202EU+001BnnA"),
            ("#/search", ".who", "aU+2067@x.test"),
            ("#/search?q=%00%E2%80%AE", ".nothing", "“U+0000U+202E”"),
            ("#/failed", ".groups", "NoU+202E good"),
            ("#/failed/50", "#raw", r#""message": "\ud800\u0000U+202E""#),
            ("", ".reasons", "NoU+202E good"),
        ] {
            desk.go(view, there).await;
            desk.browser.until_text(there, text).await;
            assert_eq!(desk.browser.eval(invisible).await, false, "{view}");
        }
        desk.done().await;
    })
    .await;
}

#[tokio::test]
#[ignore = "needs chromium"]
async fn empty_message_is_marked() {
    let texts = [
        "",
        " \t\n",
        "\u{3000}\u{a0}",
        "\u{200d}\u{fe0f}",
        "not empty",
    ];
    let events = (1..).zip(texts);
    let events: String = events
        .map(|(id, text)| failed_message(id, text, "why"))
        .collect();
    run_test(async |t| {
        let desk = Desk::over(t, &format!("{CONVERSATION}{events}")).await;
        let empty = "(empty message)";
        let expected = json!([empty, empty, empty, empty, "not empty"]);
        for (view, selector) in [
            ("#/conversations/100", ".words"),
            ("#/failed?reason=why", ".says"),
        ] {
            desk.go(view, selector).await;
            assert_eq!(desk.texts(selector).await, expected, "{view}");
            let muted = desk.texts(&format!("{selector} .muted")).await;
            assert_eq!(muted, json!([empty, empty, empty, empty]), "{view}");
        }
        desk.done().await;
    })
    .await;
}

#[tokio::test]
#[ignore = "needs chromium"]
async fn long_message_shown_whole() {
    let text = format!("{}the end", "long ".repeat(40_000));
    let events = failed_message(1, &text, "why");
    run_test(async |t| {
        let desk = Desk::over(t, &format!("{CONVERSATION}{events}")).await;
        desk.go("#/conversations/100", ".words").await;
        desk.browser.click(".words a", "show all of it").await;
        desk.browser
            .until("document.querySelector('#raw')?.textContent.includes('long the end')")
            .await;
        desk.done().await;
    })
    .await;
}

/// Ids of 64 bits are shown exactly, although they are too large for JavaScript's numbers.
#[tokio::test]
#[ignore = "needs chromium"]
async fn ids_of_64_bits() {
    let ids = [
        9_007_199_254_740_993,
        i64::MAX,
        i64::MIN,
        12_345_678_901_234_567,
    ];
    let mut sql = String::new();
    for (index, id) in ids.iter().enumerate() {
        // Neighbouring ids, so that a rounded id would be that of another row.
        let key = 9_007_199_254_740_993 + index;
        sql += &format!(
            "INSERT INTO conversations (id, epoch, bigchat_id, first_advisor, transfer_advisor, transfer_at, details, external_id)
             VALUES ({key}, 1, {id}, {id}, {id}, 5, 'read', 'x');
             INSERT INTO resolutions (resolved_at, resolved_by, resolution, event, conversation, kind, reason)
             VALUES (1, 'command', 'retry', {key}, {id}, 'TRANSFER', 'why');"
        );
        let data = format!(r#"{{"new_advisor_id":{id},"old_advisor_id":1.0}}"#);
        sql += &dead_letter(key, key, "TRANSFER", &data, "why", 1);
    }
    run_test(async |t| {
        let desk = Desk::over(t, &sql).await;
        for (index, id) in ids.iter().enumerate() {
            let (key, id) = (9_007_199_254_740_993 + index, id.to_string());
            desk.go(&format!("#/search?q={id}"), ".found a").await;
            desk.browser
                .click(".found a", &format!("Conversation {id}"))
                .await;
            desk.browser
                .until_text("h1", &format!("Conversation {id}"))
                .await;
            desk.browser
                .until_text(".change", &format!("to advisor {id}"))
                .await;
            desk.browser
                .until_text("aside", &format!("{id}, set by the TRANSFER"))
                .await;
            desk.browser.click(".fate a.bad", "failed").await;
            desk.browser.until_text("h1", &format!("Event {key}")).await;
            desk.browser
                .until_text("#raw", &format!("\"new_advisor_id\": {id}"))
                .await;
            desk.browser
                .until_text("#raw", &format!("\"conversation_id\": {id}"))
                .await;
            desk.browser
                .until_text("#raw", "\"old_advisor_id\": 1.0")
                .await;
            desk.browser.until_text("aside", &id).await;
        }
        desk.go("#/resolutions", ".audit").await;
        for (index, id) in ids.iter().enumerate().rev() {
            let key = 9_007_199_254_740_993 + index;
            desk.browser.until_text(".audit", &format!("#{key}")).await;
            desk.browser.until_text(".audit", &id.to_string()).await;
        }
        // Only this event is discarded, and not its neighbours.
        let second = 9_007_199_254_740_994_i64;
        desk.go("#/failed?reason=why", ".rows li").await;
        desk.browser
            .until_text(".rows", "conversation -9223372036854775808")
            .await;
        desk.browser
            .click(&format!("[data-event='{second}'] input"), "")
            .await;
        desk.browser.click(".chosen button", "Discard").await;
        desk.browser.click("#ask button", "Discard").await;
        t.until_events("discarded", 1).await;
        let discarded = format!("state = 'discarded' AND id = {second}");
        assert_eq!(t.count_events(&discarded), 1);
        desk.done().await;
    })
    .await;
}

#[tokio::test]
#[ignore = "needs chromium"]
async fn json_shown_as_received() {
    run_test(async |t| {
        let desk = Desk::over(t, "").await;
        for (raw, pretty) in [
            (
                r#"{"a":9007199254740993,"b":1e400,"c":-0.10}"#,
                "{\n  \"a\": 9007199254740993,\n  \"b\": 1e400,\n  \"c\": -0.10\n}",
            ),
            (
                r#"{"2":1,"1":2,"1":[]}"#,
                "{\n  \"2\": 1,\n  \"1\": 2,\n  \"1\": []\n}",
            ),
            (
                r#"[ {}, {"a" : [1,"x, {y}: \"z\"" ] } ,null]"#,
                concat!(
                    "[\n  {},\n  {\n    \"a\": [\n      1,\n",
                    "      \"x, {y}: \\\"z\\\"\"\n    ]\n  },\n  null\n]"
                ),
            ),
            (r#""\u00e9\u0000\ud800\\""#, r#""é\u0000\ud800\\""#),
            ("18446744073709551616", "18446744073709551616"),
            ("{no json", "{no json"),
        ] {
            let shown = desk
                .browser
                .eval(&format!(
                    "import('/parts.js').then(({{ pretty }}) => pretty({}))",
                    json!(raw)
                ))
                .await;
            assert_eq!(shown, pretty, "{raw}");
        }
        desk.done().await;
    })
    .await;
}

#[tokio::test]
#[ignore = "needs chromium"]
async fn page_says_why_no_agent() {
    for case in ["advisor", "agent", "waits"] {
        run_test(async |t| {
            t.differs("OurAPI rejects what it could store");
            let why = match case {
                "advisor" => {
                    t.bigchat.forgets_advisor(7);
                    "BigChat does not know advisor 7, or has no usable record"
                }
                "agent" => {
                    t.our_api.upset("POST /agents", status(422).always());
                    "OurAPI does not accept the agent Ann (ann@x.test)"
                }
                _ => {
                    t.our_api.upset("GET /agents", status(500).always());
                    "not resolved yet: OurAPI has not been asked for Ann (ann@x.test)"
                }
            };
            t.bigchat.reports([start(42, 0)]);
            let desk = Desk::new(t).await;
            desk.go("#/search", ".found").await;
            desk.browser.until_text(".who", why).await;
            desk.picture(&format!("agentless-{case}")).await;
            desk.browser.click(".found a", "Conversation 42").await;
            desk.browser.until_text("aside", why).await;
            desk.done().await;
        })
        .await;
    }
}

#[tokio::test]
#[ignore = "needs chromium"]
async fn resolutions_on_a_phone() {
    let mut sql = String::new();
    for (by, who) in [("command", "the command line"), ("console", "the console")] {
        sql += &format!(
            "INSERT INTO resolutions (resolved_at, resolved_by, resolution, event, conversation, kind, reason)
             VALUES (1, '{by}', 'retry', 3, 42, 'MESSAGE', '{who}?');"
        );
    }
    sql += "INSERT INTO resolutions (resolved_at, resolved_by, resolution, event, conversation, kind, reason)
        VALUES (1, 'console', 'discard', 4, NULL, 'UNREADABLE', 'why');";
    run_test(async |t| {
        let desk = Desk::over(t, &sql).await;
        for theme in ["light", "dark"] {
            desk.browser.system_prefers(theme).await;
            for size in [PHONE, DESK] {
                desk.browser.resize(size).await;
                desk.go("#/resolutions", ".audit tbody tr").await;
                let who = desk.browser.eval(&shown("td:nth-child(6)")).await;
                assert_eq!(
                    who,
                    json!(["the console", "the console", "the command line"])
                );
                let conversations = desk.browser.eval(&shown("td:nth-child(4)")).await;
                assert_eq!(conversations, json!(["none", "42", "42"]));
                let beyond = "[...document.querySelectorAll('.audit *')] \
                 .filter((e) => e.getBoundingClientRect().right > innerWidth).length";
                assert_eq!(desk.browser.eval(beyond).await, 0, "{size:?}");
                desk.picture(&format!("audit-{theme}-{}", size.0)).await;
                desk.go("#/", ".lately li").await;
                desk.browser
                    .until_text(".lately", "by the command line")
                    .await;
                let width = desk
                    .browser
                    .eval("document.documentElement.scrollWidth")
                    .await;
                assert_eq!(width, size.0);
            }
        }
        desk.done().await;
    })
    .await;
}

#[tokio::test]
#[ignore = "needs chromium"]
async fn retry_highlighted_if_it_can_succeed() {
    run_test(async |t| {
        t.differs("OurAPI rejects what it could store");
        t.our_api
            .upset("POST /chats/c1/messages*No", status(422).always());
        let desk = Desk::new(t).await;
        t.delivers([start(42, 0), start(43, 1)]).await;
        t.bigchat.reports([message(42, 5, "No")]);
        t.until_events("failed", 1).await;
        t.bigchat
            .reports(raw(r#"{"nextPageUrl":null,"events":[{}]}"#));
        t.until_events("failed", 2).await;
        let Desk {
            daemon, browser, ..
        } = desk;
        browser.close().await;
        daemon.stop().await;
        t.execute(&spent(90, 43));
        let desk = Desk::new(t).await;
        let (rejected, unreadable, spent) = (3, t.latest("UNREADABLE"), 90);
        for (event, highlighted) in [
            (rejected, "discard"),
            (unreadable, "discard"),
            (spent, "retry"),
        ] {
            // Only the first button is highlighted.
            let primary = |within: &str| {
                format!(
                    "JSON.stringify([...document.querySelectorAll('{within} button:not(.icon)')] \
                 .filter((b) => b.dataset.do !== 'select-none') \
                 .map((b) => [b.dataset.do, !b.classList.contains('quiet')]))"
                )
            };
            let other = if highlighted == "retry" {
                "discard"
            } else {
                "retry"
            };
            let expected = json!([[highlighted, true], [other, false]]).to_string();
            desk.go(&format!("#/failed/{event}"), ".head button").await;
            desk.browser
                .until_text("h1", &format!("Event {event}"))
                .await;
            assert_eq!(
                desk.browser.eval(&primary(".head")).await,
                expected,
                "event {event}"
            );
            desk.browser.click(".back a", "Failed events").await;
            desk.browser
                .until(&format!(
                    "document.querySelector('[data-event=\"{event}\"]')"
                ))
                .await;
            desk.picture(&format!("group-{event}")).await;
            assert_eq!(
                desk.browser.eval(&primary(".group > header")).await,
                expected,
                "event {event}"
            );
            desk.browser
                .click(&format!("[data-event='{event}'] input"), "")
                .await;
            desk.browser.until_text(".chosen", "1 selected").await;
            assert_eq!(
                desk.browser.eval(&primary(".chosen")).await,
                expected,
                "event {event}"
            );
            desk.browser.click(".chosen button", "Clear").await;
            if event != unreadable {
                let key: i64 = t.value(&format!(
                    "SELECT conversation FROM event_states WHERE id = {event}"
                ));
                desk.go(&format!("#/conversations/{key}"), ".head button")
                    .await;
                assert_eq!(
                    desk.browser.eval(&primary(".head")).await,
                    expected,
                    "event {event}"
                );
                desk.picture(&format!("conversation-{event}")).await;
            }
        }
        desk.done().await;
    })
    .await;
}
