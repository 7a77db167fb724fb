//! The console in a real browser: an operator's actions, and their effects in OurAPI and in the journal.
//!
//! `cargo test console:: -- --ignored` runs these; they need Debian's `chromium` and `chromium-driver`.

use crate::harness::journal::dead_letter;
use crate::harness::web::{TOKEN, console_token};
use crate::harness::{Daemon, Test, run_test, until};
use bigchat_sync::settings::Tokens;
use bigchat_sync::simulator::bigchat::raw;
use bigchat_sync::simulator::event::{event, message, start, transfer};
use bigchat_sync::simulator::fault::status;
use bigchat_sync::simulator::id;
use serde_json::json;

use crate::harness::browser::{
    Browser, DESK, DOWN, ENTER, ESCAPE, HOME, LEFT, PHONE, RIGHT, SPACE, TAB,
};

/// OurAPI's response to a message that it never stores.
const NO: &str = r#"{"detail":[{"msg":"String should have at least 2 characters"}]}"#;

/// The list of events that failed for that reason.
const REFUSED: &str = "#/failed?reason=OurAPI%20permanently%20rejects%20it%3A%20String%20should%20have%20at%20least%202%20characters";

/// A daemon with a console, and a conversation 42 with a chat in OurAPI.
struct Desk<'a> {
    t: &'a Test,
    daemon: Daemon,
    url: String,
}

impl<'a> Desk<'a> {
    async fn new(t: &'a Test) -> Self {
        Self::over(t, Tokens::default()).await
    }

    async fn over(t: &'a Test, tokens: Tokens) -> Self {
        // The status would report a stopped clock as a problem.
        t.bigchat.clock_runs(0);
        let (daemon, url) = t.start_listening(tokens);
        t.delivers([start(42, 0), message(42, 5, "Hello, is anybody there?")])
            .await;
        Self { t, daemon, url }
    }

    /// Adds messages to conversation 42 that OurAPI rejects.
    async fn with_failed(t: &'a Test, texts: &[&str]) -> Self {
        let desk = Self::new(t).await;
        desk.fail(texts).await;
        desk
    }

    async fn fail(&self, texts: &[&str]) {
        for text in texts {
            let pattern = format!("POST /chats/c1/messages*{text}");
            self.t
                .our_api
                .upset(&pattern, status(422).body(NO).always());
        }
        let failed = self.t.events("failed") + i64::try_from(texts.len()).expect("few");
        let events = (10..).zip(texts).map(|(at, text)| message(42, at, text));
        self.t.bigchat.reports(events.collect::<Vec<_>>());
        self.t.until_events("failed", failed).await;
    }

    async fn open(&self, view: &str) -> Browser {
        Browser::open(&self.at(view), DESK).await
    }

    fn at(&self, view: &str) -> String {
        format!("{}/{view}", self.url)
    }

    /// The resolutions, such as `retry 3`, the latest last.
    fn resolutions(&self) -> String {
        let resolutions = self.t.resolutions().into_iter().map(|past| {
            let interface = past.by.rsplit(", ").next().unwrap_or_default();
            format!("{} {} {interface}", past.resolution, past.event)
        });
        resolutions.collect::<Vec<_>>().join(", ")
    }

    async fn done(self, browser: Browser) {
        browser.close().await;
        self.daemon.stop().await;
    }
}

#[tokio::test]
#[ignore = "needs chromium"]
async fn deliveries_are_paused_and_resumed() {
    run_test(async |t| {
        let desk = Desk::new(t).await;
        let browser = desk.open("").await;
        browser.click(".verdict button", "Pause deliveries").await;
        browser.until("document.querySelector('#pause').open").await;
        browser
            .eval("void (document.querySelector('#pause-for').value = '3600')")
            .await;
        browser.click("#pause button", "Pause").await;
        browser.until_text("#held", "Deliveries are paused.").await;
        browser
            .until("document.querySelector('.verdict button') === null")
            .await;
        assert!(!t.status().0["paused"].is_null());
        browser.go(&desk.at("#/search?q=ann")).await;
        browser.until_text(".found", "Conversation 42").await;
        browser.until_text("#held", "Nothing is sent").await;
        browser
            .until("/[A-Z]{2}/.test(document.querySelector('.found time').textContent)")
            .await;
        browser.click("#held button", "Resume").await;
        browser
            .until("document.querySelector('#held').hidden")
            .await;
        assert!(t.status().0["paused"].is_null());
        desk.done(browser).await;
    })
    .await;
}

#[tokio::test]
#[ignore = "needs chromium"]
async fn failed_event_found_and_retried() {
    run_test(async |t| {
        let desk = Desk::with_failed(t, &["Refused for now"]).await;
        let browser = desk.open("").await;
        browser
            .until_text(".verdict h1", "One thing needs attention")
            .await;
        browser.click("a.figure", "1").await;
        browser
            .until_text("#group-title", "OurAPI permanently rejects it")
            .await;
        browser.click(".rows a", "MESSAGE").await;
        browser
            .until_text("#raw", "\"message\": \"Refused for now\"")
            .await;
        browser.until_text(".exchange", "POST /chats/").await;
        browser
            .until_text(".exchange", "String should have at least 2 characters")
            .await;
        browser
            .until_text(".attempts", "OurAPI permanently rejects it")
            .await;

        t.our_api.calm();
        browser.click(".head button", "Retry").await;
        browser.until_text(".verdict-line", "Delivered").await;
        assert_eq!(
            t.our_api.messages(),
            ["Hello, is anybody there?", "Refused for now"]
        );
        browser
            .until("document.querySelector('#failed-count').hidden")
            .await;
        assert_eq!(desk.resolutions(), "retry 3 console");
        browser.click(".tabs a", "Resolutions").await;
        browser.until_text(".audit", "retried").await;
        browser.until_text(".audit", ", console").await;
        desk.done(browser).await;
    })
    .await;
}

#[tokio::test]
#[ignore = "needs chromium"]
async fn selected_events_discarded_after_asking() {
    run_test(async |t| {
        t.differs("OurAPI rejects messages that it could store");
        let desk = Desk::with_failed(t, &["one", "two", "three", "four"]).await;
        let browser = desk.open("#/failed").await;
        browser
            .until("document.querySelectorAll('.rows li').length === 4")
            .await;
        for event in [3, 5] {
            browser
                .click(&format!("[data-event='{event}'] input"), "")
                .await;
        }
        browser.until_text(".chosen", "2 selected").await;
        browser.click(".chosen button", "Discard").await;
        browser.until_text("#ask", "Discard 2 events?").await;
        browser.click("#ask button", "Keep").await;
        browser.until("!document.querySelector('#ask').open").await;
        assert_eq!((t.events("failed"), desk.resolutions().as_str()), (4, ""));

        browser.click(".chosen button", "Discard").await;
        browser.click("#ask button", "Discard 2").await;
        t.until_events("discarded", 2).await;
        browser
            .until("document.querySelectorAll('.rows li').length === 2")
            .await;
        assert_eq!(desk.resolutions(), "discard 3 console, discard 5 console");

        t.our_api.calm();
        browser.click(".group button", "Retry both").await;
        browser
            .until_text("main", "No failed events need action")
            .await;
        until("both are delivered", async || {
            t.our_api.message_count() == 3
        })
        .await;
        assert_eq!(t.count_events("state = 'discarded' AND id IN (3, 5)"), 2);
        desk.done(browser).await;
    })
    .await;
}

#[tokio::test]
#[ignore = "needs chromium"]
async fn groups_discarded_one_and_all() {
    run_test(async |t| {
        t.differs("OurAPI rejects messages that it could store");
        let desk = Desk::with_failed(t, &["one", "two"]).await;
        t.bigchat.reports(raw(
            &json!({"events": [event(42, "PAUSE", 100, json!(null))]}).to_string(),
        ));
        t.until_events("failed", 3).await;
        let browser = desk.open("#/failed").await;
        browser.click(".groups a", "Unknown event name").await;
        browser.until_text(".rows", "PAUSE").await;
        browser.click(".group button", "Discard it").await;
        browser.click("#ask button", "Discard").await;
        t.until_events("discarded", 1).await;
        browser
            .until_text(".groups", "OurAPI permanently rejects it")
            .await;
        assert_eq!(t.events("failed"), 2);
        browser.click(".head button", "Discard all").await;
        browser.click("#ask button", "Discard 2").await;
        t.until_events("discarded", 3).await;
        browser
            .until_text("main", "No failed events need action")
            .await;
        desk.done(browser).await;
    })
    .await;
}

/// A search finds a conversation by its id, its chat or its agent. The conversation's page shows what was sent.
#[tokio::test]
#[ignore = "needs chromium"]
async fn conversations_found_by_search() {
    run_test(async |t| {
        t.bigchat
            .advisor(7, "Jane O'Hara", "jane.ohara@example.com");
        t.bigchat.advisor(8, "Wei Zhang", "wei@example.com");
        let desk = Desk::over(t, Tokens::default()).await;
        t.delivers([start(43, 20), transfer(43, 30, 8)]).await;
        let browser = desk.open("#/search").await;
        browser
            .until("document.querySelectorAll('.found li').length === 2")
            .await;
        let chat = id("c2");
        for (text, title) in [
            ("42", "Conversation 42"),
            (chat.as_str(), "Conversation 43"),
            ("jane", "Conversation 42"),
            ("wei@example.com", "Conversation 43"),
        ] {
            browser.press("/").await;
            browser.press(text).await;
            browser.press(ENTER).await;
            browser
                .until_text(".under", &format!("1 conversation for “{text}”"))
                .await;
            assert!(browser.text(".found").await.starts_with(title), "{text}");
        }
        browser.press("/").await;
        browser.press("nobody@example.com").await;
        browser.press(ENTER).await;
        browser
            .until_text("main", "Nothing for “nobody@example.com”")
            .await;

        browser.go(&desk.at("#/search?q=42")).await;
        browser.click(".found a", "Conversation 42").await;
        browser
            .until("document.querySelectorAll('.entry').length === 2")
            .await;
        let entries = browser
            .eval("[...document.querySelectorAll('.entry')].map((e) => e.innerText)")
            .await;
        let entry = |index: usize| entries[index].as_str().expect("text");
        assert!(
            entry(0).contains("START") && entry(0).contains("chat created"),
            "{entries}"
        );
        assert!(
            entry(1).contains("Hello, is anybody there?") && entry(1).contains("message added"),
            "{entries}"
        );
        browser.until_text("aside", &id("c1")).await;
        browser.until_text("aside", "Jane O'Hara").await;
        browser.until_text("aside", "jane.ohara@example.com").await;
        desk.done(browser).await;
    })
    .await;
}

/// The theme is the system's until one is chosen, and the choice is remembered.
#[tokio::test]
#[ignore = "needs chromium"]
async fn theme_of_system_until_chosen() {
    run_test(async |t| {
        let desk = Desk::new(t).await;
        let browser = desk.open("").await;
        let is_dark =
            "getComputedStyle(document.documentElement).backgroundColor === 'rgb(14, 17, 22)'";
        let is_light =
            "getComputedStyle(document.documentElement).backgroundColor === 'rgb(245, 246, 248)'";
        browser.system_prefers("dark").await;
        browser.until(is_dark).await;
        browser.system_prefers("light").await;
        browser.until(is_light).await;
        for expected in [is_light, is_dark] {
            browser.click("#theme", "").await;
            browser.until(expected).await;
        }
        browser.reload().await;
        browser.until_text(".verdict h1", "Healthy").await;
        browser.until(is_dark).await;
        browser.click("#theme", "").await;
        browser.until(is_light).await;
        desk.done(browser).await;
    })
    .await;
}

/// The page reports the lost connection, still shows the last state, and resolves nothing until it is connected again.
#[tokio::test]
#[ignore = "needs chromium"]
async fn lost_connection_to_the_daemon() {
    run_test(async |t| {
        t.differs("OurAPI rejects messages that it could store");
        let desk = Desk::with_failed(t, &["Still to be seen"]).await;
        let Desk { t, daemon, url } = desk;
        let browser = Browser::open(&format!("{url}/#/failed"), DESK).await;
        browser.until_text(".rows", "Still to be seen").await;
        daemon.stop().await;
        browser
            .until_text("#lost", "No connection to bigchat-sync")
            .await;
        browser.until_text("#live", "Offline").await;
        browser.until_text(".rows", "Still to be seen").await;
        browser.click(".group button", "Retry it").await;
        browser.until_text("#toast", "no connection").await;
        assert_eq!(t.events("failed"), 1);

        t.set("--listen", url.trim_start_matches("http://"));
        t.start();
        browser.click("#lost button", "Try now").await;
        browser
            .until("document.querySelector('#lost').hidden")
            .await;
        browser.click(".group button", "Retry it").await;
        browser
            .until_text("#toast", "1 event will be tried again")
            .await;
        browser.close().await;
    })
    .await;
}

#[tokio::test]
#[ignore = "needs chromium"]
async fn html_in_messages_stays_text() {
    const EVIL: &str = "<script>window.evil=1</script><img src=x onerror='window.evil=1'>";
    run_test(async |t| {
        t.differs("OurAPI rejects messages that it could store");
        t.bigchat
            .advisor(7, "<b onclick=evil()>Jane</b>", "<i>jane@example.com");
        let desk = Desk::over(t, Tokens::default()).await;
        t.delivers([message(42, 6, &format!("{EVIL} delivered"))])
            .await;
        desk.fail(&[&format!("{EVIL} failed")]).await;
        let unreadable = json!({"conversation_id": 42, "event_name": EVIL, "event_at": 5});
        t.bigchat.reports(vec![unreadable]);
        t.until_events("failed", 2).await;

        let browser = desk.open("").await;
        for (view, wherein) in [
            ("", ".reasons"),
            ("#/failed", ".groups"),
            (REFUSED, ".rows"),
            ("#/failed/4", "#raw"),
            ("#/failed/5", "#raw"),
            ("#/conversations/2", ".words"),
        ] {
            browser.go(&desk.at(view)).await;
            browser
                .until_text(wherein, "<script>window.evil=1</script>")
                .await;
        }
        browser
            .until_text("aside", "<b onclick=evil()>Jane</b>")
            .await;
        browser
            .go(&desk.at("#/search?q=%3Cscript%3Ewindow.evil=1%3C/script%3E"))
            .await;
        browser.until_text("main", "Nothing for “<script>").await;
        let harm = browser
            .eval(
                "[window.evil ?? null, \
             document.querySelectorAll('main script, main img, main b[onclick]').length]",
            )
            .await;
        assert_eq!(harm, json!([null, 0]));
        desk.done(browser).await;
    })
    .await;
}

#[tokio::test]
#[ignore = "needs chromium"]
async fn console_by_keyboard_alone() {
    run_test(async |t| {
        t.differs("OurAPI rejects messages that it could store");
        let desk = Desk::with_failed(t, &["one", "two", "three"]).await;
        let browser = desk.open("").await;
        browser.until_text(".verdict", "attention").await;
        let focused = "document.activeElement";
        browser.press(TAB).await;
        browser
            .until(&format!("{focused}.className === 'skip'"))
            .await;
        browser.press("?").await;
        browser.until("document.querySelector('#help').open").await;
        browser.press(ESCAPE).await;
        browser.until("!document.querySelector('#help').open").await;

        browser.press("gf").await;
        browser
            .until("document.querySelectorAll('.rows li').length === 3")
            .await;
        browser.press("j").await;
        browser
            .until(&format!(
                "{focused}.closest('[data-event]')?.dataset.event === '3'"
            ))
            .await;
        let outline = browser
            .eval(&format!("getComputedStyle({focused}).outlineStyle"))
            .await;
        assert_eq!(outline, "solid", "the focus is visible");
        browser.press("x").await;
        browser.press(DOWN).await;
        browser.press("x").await;
        browser.until_text(".chosen", "2 selected").await;
        browser.press("d").await;
        browser.until_text("#ask", "Discard 2 events?").await;
        browser.press(ESCAPE).await;
        browser.until("!document.querySelector('#ask').open").await;
        assert_eq!(t.events("failed"), 3);
        browser.press("d").await;
        browser.until("document.querySelector('#ask').open").await;
        browser.press(&format!("{TAB}{ENTER}")).await;
        t.until_events("discarded", 2).await;
        browser
            .until("document.querySelectorAll('.rows li').length === 1")
            .await;

        browser.press("j").await;
        browser.press(ENTER).await;
        browser.until("location.hash === '#/failed/5'").await;
        browser.until_text(".head h1", "Event 5").await;
        browser.until_text(".head", "Retry").await;
        t.our_api.calm();
        browser.press("r").await;
        browser.until_text(".verdict-line", "Delivered").await;
        browser.press(ESCAPE).await;
        browser
            .until("location.hash.startsWith('#/failed') && location.hash !== '#/failed/5'")
            .await;
        // Letters and spaces in the search field are not commands.
        browser.press("/gd").await;
        browser.press(SPACE).await;
        browser
            .until("document.querySelector('#q').value === 'gd '")
            .await;
        assert_ne!(browser.eval("location.hash").await, "#/resolutions");
        desk.done(browser).await;
    })
    .await;
}

/// Nothing is wider than a phone, in either theme.
#[tokio::test]
#[ignore = "needs chromium"]
async fn phone_width_in_both_themes() {
    run_test(async |t| {
        t.differs("OurAPI rejects messages that it could store");
        let long = "A message that is far too long for a phone, since its author \
            wrote_it_all_in_one_word_and_did_not_stop_at_the_margin";
        let desk = Desk::with_failed(t, &[long, "two"]).await;
        let browser = Browser::open(&desk.at(""), PHONE).await;
        for theme in ["light", "dark"] {
            browser.system_prefers(theme).await;
            for (view, there) in [
                ("", ".verdict"),
                ("#/failed", ".groups"),
                (REFUSED, ".rows"),
                ("#/failed/3", "#raw"),
                ("#/search", ".found"),
                ("#/conversations/2", ".line"),
                ("#/resolutions", ".nothing"),
            ] {
                browser.go(&desk.at(view)).await;
                browser
                    .until(&format!("document.querySelector('{there}')"))
                    .await;
                // A page that is too wide is scaled down until it fits, so the scale is checked, too.
                let width = browser
                    .eval("[innerWidth, document.documentElement.scrollWidth]")
                    .await;
                assert_eq!(width, json!([360, 360]), "{view} {theme}");
                let beyond = browser
                    .eval(
                        "[...document.querySelectorAll('body *')] \
                     .filter((e) => e.getBoundingClientRect().right > 360.5) \
                     .filter((e) => !e.closest('.scroll, .unseen, pre, svg')) \
                     .filter((e) => e.checkVisibility()) \
                     .map((e) => e.outerHTML.slice(0, 120))",
                    )
                    .await;
                assert_eq!(beyond, json!([]), "{view} {theme}");
            }
        }
        browser.click(".tabs a", "Failed").await;
        browser
            .click(".groups a", "OurAPI permanently rejects")
            .await;
        browser.until_text(".rows", "two").await;
        browser.click(".back a", "All reasons").await;
        browser
            .until("document.querySelector('.groups')?.checkVisibility()")
            .await;
        desk.done(browser).await;
    })
    .await;
}

#[tokio::test]
#[ignore = "needs chromium"]
async fn chart_by_keyboard_and_as_table() {
    run_test(async |t| {
        let desk = Desk::new(t).await;
        let browser = desk.open("#/?hours=1").await;
        browser.until_text("#legend", "MESSAGE\n1").await;
        browser.until_text("#legend", "delivered\n2").await;
        let slider = "document.querySelector('#chart-slider')";
        browser.eval(&format!("{slider}.focus()")).await;
        browser
            .until("!document.querySelector('#chart-tip').hidden")
            .await;
        let mut starts = 0;
        for _ in 0..60 {
            let text = browser
                .eval(&format!("{slider}.getAttribute('aria-valuetext')"))
                .await;
            starts += i32::from(text.as_str().expect("text").contains("1 START"));
            browser.press(LEFT).await;
        }
        assert_eq!(starts, 1);
        browser.press(HOME).await;
        browser
            .until(&format!("{slider}.getAttribute('aria-valuenow') === '0'"))
            .await;
        browser.press(RIGHT).await;
        browser
            .until(&format!("{slider}.getAttribute('aria-valuenow') === '1'"))
            .await;
        browser.click("#chart-details summary", "As a table").await;
        browser
            .until("document.querySelectorAll('#chart-table tbody tr').length === 60")
            .await;
        desk.done(browser).await;
    })
    .await;
}

#[tokio::test]
#[ignore = "needs chromium"]
async fn login_and_logout_with_token() {
    run_test(async |t| {
        let desk = Desk::over(t, console_token()).await;
        let browser = desk.open("#/search").await;
        browser.until_text("main", "Sign in").await;
        browser.press("wrong").await;
        browser.press(ENTER).await;
        browser.until_text("#wrong", "Wrong token").await;
        browser.press(TOKEN).await;
        browser.press(ENTER).await;
        browser.until_text(".found", "Conversation 42").await;
        browser.reload().await;
        browser.until_text(".found", "Conversation 42").await;
        browser.click("#leave", "Sign out").await;
        browser.until_text("main", "Sign in").await;
        browser.reload().await;
        browser.until_text("main", "Sign in").await;
        desk.done(browser).await;
    })
    .await;
}

/// A journal after six busy hours, with an outage of OurAPI in the middle.
fn six_hours() -> String {
    let now = chrono::Utc::now().timestamp_millis();
    let mut sql = String::from("BEGIN;");
    let mut dice = 7_u64;
    let mut roll = |sides: u64| {
        dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (dice >> 33) % sides
    };
    let mut behind = 0;
    for ago in (0..360_i64).rev() {
        let swell = 24 - (ago - 120).abs() / 16 + (ago / 9) % 5;
        let down = (150..168).contains(&ago);
        for (kind, share) in [("MESSAGE", 20), ("START", 3), ("END", 3), ("TRANSFER", 1)] {
            let most = (u64::try_from(swell).expect("positive") * share).div_ceil(10);
            let received = most / 2 + roll(most.max(2));
            let (delivered, failed) = match (down, behind) {
                (true, _) => (0, 0),
                (false, 0) => (received, u64::from(kind == "MESSAGE" && roll(40) == 0)),
                (false, late) => (received + late.min(60), 0),
            };
            behind = behind + received - delivered.min(behind + received);
            sql += &format!(
                "INSERT INTO activity VALUES ({} - {ago}, '{kind}', {received}, {delivered}, {failed});",
                now / 60_000
            );
        }
    }
    sql += "INSERT INTO advisors (epoch, bigchat_id, name, email) VALUES (1, 3, 'Jane O''Hara', 'jane.ohara@example.com');
        INSERT INTO conversations (id, epoch, bigchat_id, started_at, first_advisor, details, external_id, offset)
        VALUES (500, 1, 1288, 1, 3, 'read', '1288', 400);";
    for event in 1..=400 {
        let took = 18 + roll(60) + roll(20) * u64::from(roll(30) == 0) * 12;
        let at = now - 3_000_000 + event * 6_000;
        sql += &format!(
            "INSERT INTO events (id, conversation, kind, event_at, data, fingerprint, received_at)
             VALUES ({event}, 500, 'MESSAGE', {}, '{{\"message\":\"Hello\"}}', {event}, {at});
             INSERT INTO deliveries (conversation, from_event, through, delivered_at, effect, waited)
             VALUES (500, {event}, {event}, {at} + {took}, 'message added', {took});",
            at / 1000
        );
    }
    let reasons = [
        (
            "OurAPI permanently rejects it: String should have at least 2 characters",
            9,
        ),
        (
            "OurAPI permanently rejects it: Message rejected by the spam filter",
            4,
        ),
        ("OurAPI gave no usable answer", 1),
    ];
    let mut event = 1000;
    for (reason, count) in reasons {
        for number in 1..=count {
            event += 7;
            let at = now - 400_000 * number - 130_000;
            sql += &format!(
                "{}UPDATE events SET event_at = {at} / 1000, received_at = {at} WHERE id = {event};
                 UPDATE dead_letters SET failed_at = {at} WHERE event = {event};",
                dead_letter(event, 500, "MESSAGE", r#"{"message":"k"}"#, reason, 1)
            );
        }
    }
    for (ago, by, decision, event) in [
        (9_000_000, "command", "discard", 310),
        (8_100_000, "console", "retry", 322),
        (3_000_000, "console", "retry", 341),
        (640_000, "console", "discard", 377),
    ] {
        sql += &format!(
            "INSERT INTO resolutions (resolved_at, resolved_by, resolution, event, conversation, kind, reason)
             VALUES ({}, '{by}', '{decision}', {event}, 1288, 'MESSAGE', 'OurAPI permanently rejects it');",
            now - ago
        );
    }
    sql + &format!(
        "UPDATE poll_state SET newest_event = {now} / 1000 - 4;
         INSERT OR REPLACE INTO api_status VALUES
            ('bigchat', 'up', {now} - 52000000, NULL, 0, NULL, NULL, NULL, {now} - 2000, 'GET /events', '200'),
            ('our_api', 'up', {now} - 9000000, NULL, 0, NULL, NULL, NULL, {now} - 1000, 'POST /chats', '201');
         COMMIT;"
    )
}

/// `BIGCHAT_SYNC_TEST_PICTURES=1` stores the pictures for the README. They have the font that the page prefers if
/// Debian's `fonts-inter` is installed.
#[tokio::test]
#[ignore = "needs chromium"]
async fn pictures_in_both_themes() {
    run_test(async |t| {
        t.bigchat.clock_runs(0);
        t.fill(&six_hours()).await;
        let (_, url) = t.start_listening(Tokens::default());
        let browser = Browser::open(&url, (1280, 1120)).await;
        browser.until_text("#legend", "MESSAGE").await;
        browser.until_text("#live", "Needs attention").await;
        for theme in ["light", "dark"] {
            browser.system_prefers(theme).await;
            let picture = browser.picture().await;
            assert!(
                picture.starts_with(b"\x89PNG") && picture.len() < 200_000,
                "{theme}: {}",
                picture.len()
            );
            if std::env::var_os("BIGCHAT_SYNC_TEST_PICTURES").is_some() {
                let path = format!(
                    "{}/src/console/page/{theme}.png",
                    env!("CARGO_MANIFEST_DIR")
                );
                std::fs::write(path, picture).expect("a file");
            }
        }
        browser.close().await;
    })
    .await;
}

/// A conversation with a discarded event, or with a loss that was not restored, is not shown as delivered completely.
#[tokio::test]
#[ignore = "needs chromium"]
async fn conversation_with_a_discarded_event() {
    run_test(async |t| {
        let desk = Desk::over(t, Tokens::default()).await;
        t.bigchat.reports([message(42, 60, "k")]);
        t.until_events("failed", 1).await;
        t.failed_command(&["discard", "--all", "--yes"])
            .expect("a discard");
        let browser = desk.open("#/search?q=42").await;
        browser.until_text(".found .chip", "1 discarded").await;
        t.execute("UPDATE conversations SET missing = '1 message'");
        browser
            .until_text(".found .chip", "not complete in OurAPI")
            .await;
        desk.done(browser).await;
    })
    .await;
}
