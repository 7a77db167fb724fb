//! Exhaustive check of the delivery protocol (store, claim, send, commit) for small cases, with every possible fault at
//! every step.
//!
//! A state consists of a [`World`], which outlasts the daemon, and the faults of the daemon's next life (`fate`). For
//! each state, the real daemon runs through that life until it is at rest (see [`life`]). The properties must be true
//! at every step and at the end, so every reachable state leads to the expected result if no further fault occurs. The
//! successors of a state are the same life with one more fault at a later step, and the life after the daemon dies at a
//! step that changed something. The expected result comes from [`compare`](crate::simulator::compare), which shares no
//! code with the daemon.

mod life;
mod script;
mod weeks;
mod world;

use std::cell::Cell;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use clap::Parser;
use serde_json::Value;
use stateright::{Checker, HasDiscoveries, Model, Property};

use crate::cli::Cli;
use crate::domain::time::Millis;
use crate::journal::Store;
use crate::mutex::lock;
use crate::settings::{Settings, VerifyEvery};
use crate::simulator::event::{T0, end, message, start, transfer};
use life::{Life, Step, Strike, Wrong};
use script::{Epoch, Page, Script};
use world::World;

thread_local! {
    /// When the daemon on this thread started, by the simulated clock of this machine and by Tokio's, which jumps.
    static CLOCK: Cell<Option<(Millis, tokio::time::Instant)>> = const { Cell::new(None) };
}

/// This machine's clock, if it is simulated.
pub(crate) fn clock() -> Option<Millis> {
    CLOCK.get().map(|(start, at)| start.plus(at.elapsed()))
}

fn set_clock(clock: Option<(Millis, tokio::time::Instant)>) {
    CLOCK.set(clock);
}

/// Whether a verification pass in idle time has begun after `since` and verified all chats.
fn is_verified(store: &mut Store, since: Millis) -> bool {
    let is_verified = store.connection().query_row(
        "SELECT EXISTS (SELECT 1 FROM verifications WHERE idle AND requested_at > ?1 AND ended_at IS NOT NULL)",
        [since.0],
        |row| row.get(0),
    );
    is_verified.expect("an answer")
}

/// The same as the interval at which delivery checks the journal anyway, so that little happens in between.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// A script, and the faults that may strike.
struct Case {
    script: Arc<Script>,
    settings: Settings,
    /// The maximum number of faults and deaths, one after the other.
    depth: usize,
    strikes: &'static [Strike],
    /// Whether an older copy of the database may be restored after a death.
    copies: bool,
    /// The latest life. Its properties are checked first, and then its successors are derived.
    last: Mutex<Option<(State, Arc<Life>)>>,
    /// The first state with a violated property. No further state is checked.
    wrong: Mutex<Option<State>>,
}

#[derive(Clone)]
struct State {
    world: Arc<World>,
    fate: Vec<(usize, Strike)>,
    /// How many more faults and deaths are allowed. This number does not distinguish states.
    left: usize,
}

impl PartialEq for State {
    fn eq(&self, other: &Self) -> bool {
        self.fate == other.fate && self.world == other.world
    }
}

impl Hash for State {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        self.world.hash(hasher);
        self.fate.hash(hasher);
    }
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}, and then {:?}", self.world, self.fate)
    }
}

#[derive(Debug, Clone, PartialEq)]
enum Action {
    /// This fault at that step.
    Strike(usize, Strike, String),
    /// The daemon dies right after that step and starts again, perhaps with a copy of the database from another step.
    Die {
        after: usize,
        what: String,
        copy: Option<usize>,
    },
}

impl Case {
    fn new(script: Script, depth: usize, strikes: &'static [Strike]) -> Self {
        let mut settings = Cli::try_parse_from(["bigchat-sync"])
            .expect("defaults")
            .settings;
        // A failed event is due again immediately, so that random jitter makes no difference.
        (settings.retry_initial, settings.retry_max) = (Duration::ZERO, Duration::ZERO);
        settings.poll_interval = POLL_INTERVAL;
        settings.request_timeout = life::TIMEOUT;
        settings.verify_every = VerifyEvery::Off;
        if script.log.is_some() {
            settings.since = Some(Millis(T0 * 1000));
        }
        Self {
            script: Arc::new(script),
            settings,
            depth,
            strikes,
            copies: false,
            last: Mutex::new(None),
            wrong: Mutex::new(None),
        }
    }

    fn life(&self, state: &State) -> Arc<Life> {
        let mut last = lock(&self.last);
        if let Some((of, life)) = &*last
            && of == state
        {
            return Arc::clone(life);
        }
        let next = state.fate.last().map_or(0, |(at, _)| *at);
        let from = (state.left > 0).then_some(next);
        let life = Arc::new(life::live(&state.world, &self.settings, &state.fate, from));
        *last = Some((state.clone(), Arc::clone(&life)));
        life
    }

    fn may_strike(&self, step: Step, strike: Strike, state: &State) -> bool {
        let count = |kind| {
            state
                .fate
                .iter()
                .filter(|(_, strike)| *strike == kind)
                .count()
        };
        match strike {
            Strike::Refused | Strike::Lost | Strike::Overdue => step == Step::WriteOurApi,
            Strike::Failed => matches!(step, Step::BigChat | Step::ReadOurApi | Step::WriteOurApi),
            Strike::LateResponse | Strike::Stop => {
                matches!(step, Step::BigChat | Step::ReadOurApi | Step::WriteOurApi)
            }
            Strike::Verify => step == Step::BigChat && count(strike) == 0,
            Strike::Wait => step != Step::ReadJournal,
            Strike::Panicked => matches!(step, Step::ReadOurApi | Step::WriteOurApi),
            Strike::Wipe => {
                matches!(step, Step::ReadOurApi | Step::WriteOurApi)
                    && state.world.wipes + count(strike) == 0
            }
            Strike::Restart => {
                step == Step::BigChat && state.world.bigchat.can_restart() && count(strike) == 0
            }
        }
    }

    fn holds(&self, state: &State, what: Wrong) -> bool {
        if lock(&self.wrong)
            .as_ref()
            .is_some_and(|wrong| wrong != state)
        {
            return true;
        }
        let life = self.life(state);
        let holds = life.wrong.iter().all(|(wrong, _)| *wrong != what);
        if !holds {
            *lock(&self.wrong) = Some(state.clone());
        }
        holds
    }

    /// Checks all reachable states, and prints the first violation.
    fn check(self, name: &str) {
        let start = Instant::now();
        let checker = self
            .checker()
            .finish_when(HasDiscoveries::Any)
            .spawn_bfs()
            .join();
        println!(
            "{name}: {} states, {} transitions, {:.1?}",
            checker.unique_state_count(),
            checker.state_count(),
            start.elapsed()
        );
        // Without this, the path to the violation could not be reconstructed.
        *lock(&checker.model().wrong) = None;
        if let Some((property, path)) = checker.discoveries().into_iter().next() {
            let (state, actions) = (path.last_state().clone(), path.into_actions());
            let life = checker.model().life(&state);
            let steps: Vec<String> = life
                .steps
                .iter()
                .enumerate()
                .map(|(number, (step, what))| format!("{number} {step:?} {what}"))
                .collect();
            let (_, wrong) = &life.wrong[0];
            panic!(
                "violated: {property:?} after {actions:?}:\n{wrong}\nfrom\n{state:?}\nby\n{}",
                steps.join("\n")
            );
        }
    }
}

impl Model for Case {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            world: Arc::new(World::new(Arc::clone(&self.script))),
            fate: Vec::new(),
            left: self.depth,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.left == 0 || lock(&self.wrong).is_some() {
            return;
        }
        let life = self.life(state);
        let next = state.fate.last().map_or(0, |(at, _)| at + 1);
        for (at, (step, what)) in life.steps.iter().enumerate().skip(next) {
            for strike in self.strikes {
                if self.may_strike(*step, *strike, state) {
                    actions.push(Action::Strike(at, *strike, what.clone()));
                }
            }
        }
        for (number, (after, _)) in life.deaths.iter().enumerate() {
            let what = &life.steps[*after].1;
            let copies = if self.copies { 0..number } else { 0..0 };
            for copy in std::iter::once(None).chain(copies.map(Some)) {
                actions.push(Action::Die {
                    after: *after,
                    what: what.clone(),
                    copy,
                });
            }
        }
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        let left = state.left.checked_sub(1)?;
        match action {
            Action::Strike(at, strike, _) => {
                let mut fate = state.fate.clone();
                fate.push((at, strike));
                Some(State {
                    world: Arc::clone(&state.world),
                    fate,
                    left,
                })
            }
            Action::Die { after, copy, .. } => {
                let life = self.life(state);
                let (_, world) = life.deaths.iter().find(|(step, _)| *step == after)?;
                let world = match copy {
                    None => Arc::clone(world),
                    Some(copy) => Arc::new(world.with_journal_of(&life.deaths[copy].1)),
                };
                Some(State {
                    world,
                    fate: Vec::new(),
                    left,
                })
            }
        }
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("no message is duplicated or misplaced", |case, state| {
                case.holds(state, Wrong::Extra)
            }),
            Property::always("delivered messages exist in OurAPI", |case, state| {
                case.holds(state, Wrong::Unfounded)
            }),
            Property::always("the result is as expected", |case, state| {
                case.holds(state, Wrong::Different)
            }),
        ]
    }
}

/// The depth that `BIGCHAT_SYNC_TEST_DEPTH` sets, or else `usual`.
fn depth(usual: usize) -> usize {
    let depth = std::env::var("BIGCHAT_SYNC_TEST_DEPTH");
    depth.map_or(usual, |depth| depth.parse().expect("a number"))
}

/// Single requests fail.
const FAULTS: &[Strike] = &[Strike::Refused, Strike::Failed, Strike::Lost];

/// The same, with faults that change the order, and with stops of the daemon.
const ORDERS: &[Strike] = &[
    Strike::Refused,
    Strike::Failed,
    Strike::Lost,
    Strike::LateResponse,
    Strike::Wait,
    Strike::Overdue,
    Strike::Stop,
];

fn page(events: impl IntoIterator<Item = Value>) -> Page {
    Page {
        events: events.into_iter().collect(),
        more: false,
    }
}

/// An epoch: the start and the first advisor of each conversation, and the reported pages.
fn epoch<const N: usize>(conversations: &[(i64, i64)], pages: [Page; N]) -> Epoch {
    Epoch {
        conversations: conversations.to_vec(),
        pages: pages.into(),
    }
}

/// A script in which each page is reported once.
fn script<const N: usize>(epochs: [Epoch; N]) -> Script {
    Script {
        log: None,
        gap: 100,
        epochs: epochs.into(),
    }
}

#[test]
fn equal_messages_in_one_second() {
    let twins = [
        start(2, 3),
        message(2, 4, "hello"),
        message(2, 4, " hello "),
    ];
    let pages = [page(twins), page([message(2, 4, "hello again")])];
    let script = script([epoch(&[(0, 1), (3, 2)], pages)]);
    Case::new(script, depth(2), FAULTS).check("equal messages");
}

#[test]
fn equal_messages_on_two_pages() {
    let first = Page {
        more: true,
        ..page([start(2, 3), message(2, 4, "hello"), message(2, 4, "there")])
    };
    let second = page([message(2, 4, "hello"), message(2, 5, "again")]);
    let script = script([epoch(&[(0, 1), (3, 2)], [first, second])]);
    Case::new(script, depth(2), &[Strike::Failed]).check("equal messages on two pages");
}

#[test]
fn changes_of_a_chat_among_messages() {
    let first = [start(2, 3), message(2, 4, "one"), transfer(2, 5, 3)];
    let second = [
        transfer(2, 4, 4),
        end(2, 6),
        message(2, 7, "two"),
        end(2, 5),
    ];
    let script = script([epoch(&[(0, 1), (3, 2)], [page(first), page(second)])]);
    Case::new(script, depth(2), &[Strike::Failed, Strike::Lost]).check("changes");
}

/// A handler panics after the request for the second of three messages was carried out: the first one stays delivered,
/// the outcome of the second one is unknown, and the chat is read back once.
#[test]
fn handler_panics_between_messages() {
    let reported = [
        start(2, 3),
        message(2, 4, "one"),
        message(2, 4, "two"),
        message(2, 5, "three"),
    ];
    let script = script([epoch(&[(0, 1), (3, 2)], [page(reported)])]);
    let case = Case::new(script, 1, &[]);
    let requests = |life: &Life, method| -> Vec<usize> {
        let steps = life.steps.iter().enumerate();
        let of_messages =
            steps.filter(|(_, (_, what))| what.starts_with(method) && what.contains("/messages"));
        of_messages.map(|(at, _)| at).collect()
    };
    let mut state = case.init_states().remove(0);
    let sent = requests(&case.life(&state), "POST");
    state.fate = vec![(sent[1], Strike::Panicked)];
    let life = case.life(&state);
    assert!(life.wrong.is_empty(), "{:?}", life.wrong);
    assert_eq!(
        requests(&life, "POST").len(),
        sent.len(),
        "none is repeated"
    );
    assert_eq!(requests(&life, "GET").len(), 1, "the chat is read back");
    let mut deaths = life.deaths.iter();
    let committed = deaths.find(|(step, _)| life.steps[*step].0 == Step::WriteJournal);
    let (_, committed) = committed.expect("a commit");
    let states: String = committed
        .store()
        .connection()
        .query_row(
            "SELECT group_concat(state || iif(outcome_unknown, ' in doubt', ''), ', ' ORDER BY s.id)
             FROM event_states s LEFT JOIN attempts a ON a.event = s.id",
            [],
            |row| row.get(0),
        )
        .expect("the states");
    assert_eq!(states, "delivered, delivered, waiting in doubt, waiting");
}

/// A handler panics at any request to OurAPI, for a new chat and for one that is read back.
#[test]
fn handler_panics() {
    let first = [start(2, 3), message(2, 4, "one"), message(2, 4, "one")];
    let second = [transfer(2, 4, 4), message(2, 7, "two"), end(2, 8)];
    let script = script([epoch(&[(0, 1), (3, 2)], [page(first), page(second)])]);
    let strikes = &[Strike::Panicked, Strike::Lost];
    Case::new(script, depth(2), strikes).check("panics");
}

#[test]
fn change_is_reverted() {
    let there = page([start(2, 3), transfer(2, 4, 3)]);
    let and_back = page([transfer(2, 24, 2), message(2, 25, "one")]);
    let pages = [page([message(2, 5, "two")]), there, and_back];
    let script = script([epoch(&[(0, 1), (3, 2)], pages)]);
    Case::new(script, depth(1), ORDERS).check("change reverted");
}

/// A change is rejected permanently, although an earlier attempt was carried out.
#[test]
fn rejected_change_was_carried_out() {
    let there = page([transfer(2, 14, 3), transfer(3, 14, 3)]);
    let and_back = page([transfer(2, 24, 2), transfer(3, 24, 2)]);
    let pages = [page([start(2, 3), start(3, 4)]), there, and_back];
    let script = script([epoch(&[(0, 1), (3, 2), (4, 2)], pages)]);
    let mut case = Case::new(script, depth(2), &[Strike::Overdue, Strike::Lost]);
    case.settings.max_attempts = 1;
    case.check("permanent rejection");
}

#[test]
fn two_conversations_of_one_advisor() {
    let reported = [
        start(2, 3),
        start(3, 4),
        message(2, 5, "one"),
        message(3, 5, "two"),
    ];
    let script = script([epoch(&[(0, 1), (3, 2), (4, 2)], [page(reported)])]);
    let mut case = Case::new(script, depth(1), ORDERS);
    case.settings.our_api_concurrency = 2;
    case.check("two conversations");
}

#[test]
fn message_comes_first() {
    let pages = [
        page([message(1, 4, "hello")]),
        page([message(2, 5, "too"), start(2, 6)]),
    ];
    let script = script([epoch(&[(0, 1), (6, 2)], pages)]);
    Case::new(script, depth(1), ORDERS).check("message first");
}

#[test]
fn bigchat_restarts() {
    let before = [page([
        start(2, 3),
        message(2, 4, "before"),
        message(1, 5, "and"),
    ])];
    let after = [
        page([message(1, 4, "after")]),
        page([start(2, 12), message(2, 13, "too")]),
    ];
    let epochs = [
        epoch(&[(0, 1), (3, 2)], before),
        epoch(&[(0, 1), (12, 3)], after),
    ];
    Case::new(script(epochs), depth(2), &[Strike::Restart, Strike::Failed])
        .check("BigChat restarts");
}

#[test]
fn bigchat_restarts_right_after_a_page() {
    let before = [page([start(3, 3), message(3, 4, "before")])];
    let after = [page([message(1, 4, "after")])];
    let epochs = [
        epoch(&[(0, 1), (1, 2), (3, 2)], before),
        epoch(&[(0, 1), (2, 3)], after),
    ];
    let script = Script {
        gap: 1,
        ..script(epochs)
    };
    Case::new(script, depth(2), &[Strike::Restart, Strike::Failed])
        .check("restarts right after a page");
}

#[test]
fn our_api_loses_everything() {
    let first = [
        start(2, 3),
        message(2, 4, "one"),
        message(2, 4, "one"),
        end(2, 5),
    ];
    let script = script([epoch(
        &[(0, 1), (3, 1)],
        [page(first), page([message(1, 14, "two")])],
    )]);
    Case::new(
        script,
        depth(2),
        &[Strike::Wipe, Strike::Failed, Strike::Lost],
    )
    .check("OurAPI loses all");
}

#[test]
fn chats_are_verified_on_request() {
    let first = [
        start(2, 3),
        message(2, 4, "one"),
        message(2, 4, "one"),
        end(2, 5),
    ];
    let script = script([epoch(&[(0, 1), (3, 1)], [page(first)])]);
    Case::new(
        script,
        depth(2),
        &[Strike::Verify, Strike::Wipe, Strike::Lost],
    )
    .check("verified on request");
}

#[test]
fn losses_that_no_event_touches() {
    let events = [start(2, 3), message(2, 4, "one"), message(1, 5, "two")];
    let script = script([epoch(&[(0, 1), (3, 1)], [page(events)])]);
    let mut case = Case::new(
        script,
        depth(1),
        &[Strike::Wipe, Strike::Failed, Strike::Lost],
    );
    case.settings.verify_every = VerifyEvery::Within(Duration::from_secs(3));
    case.check("losses without events");
}

/// A log in which one of three equal messages arrives out of order. The pages are so long that no page edge separates
/// two equal messages, which one poll would count as one.
fn log() -> Script {
    let first = [
        start(2, 3),
        message(2, 16, "one"),
        message(2, 16, "one"),
        transfer(2, 8, 3),
    ];
    let second = [message(2, 16, "one"), message(1, 18, "two"), end(2, 19)];
    let pages = [page(first), page(second)];
    Script {
        log: Some(5),
        ..script([epoch(&[(0, 1), (3, 2)], pages)])
    }
}

#[test]
fn a_stable_log() {
    Case::new(log(), depth(2), &[]).check("a log");
}

#[test]
fn an_older_copy_of_the_database() {
    let mut case = Case::new(log(), depth(1), FAULTS);
    case.copies = true;
    case.check("an older copy");
}
