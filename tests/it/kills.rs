//! SIGKILL of the real binary at random moments: nothing of a page that was kept is lost, nothing is doubled.

use std::process::Stdio;
use std::time::Duration;

use bigchat_sync::sim::bigchat::{Log, Mode, Options};
use bigchat_sync::sim::our_api;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::daemon::{agrees, sim};

/// How many kills, if the environment does not say otherwise.
const KILLS: u32 = 15;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_random_moments() {
    let variable = |name: &str| std::env::var(name).ok();
    let kills =
        variable("BIGCHAT_SYNC_TEST_KILLS").map_or(KILLS, |kills| kills.parse().expect("a number"));
    let seed = variable("BIGCHAT_SYNC_TEST_SEED").map_or(1, |seed| seed.parse().expect("a number"));
    // With a stable log nothing at all may be lost, not even what was answered and not kept.
    let log = Log {
        events_per_second: 40.0,
        page_size: 20,
        ..Log::default()
    };
    let options = Options {
        seed,
        mode: Mode::Log(log),
        ..Options::default()
    };
    let (sim, bench) = sim(options, our_api::Options::default()).await;
    let mut random = StdRng::seed_from_u64(seed);
    for _ in 0..kills {
        let mut daemon = bench
            .program("run")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("a process");
        // From before the first poll to well into the work.
        tokio::time::sleep(Duration::from_millis(random.random_range(20..400))).await;
        daemon.kill().expect("it was running");
        daemon.wait().expect("it has ended");
    }
    sim.bigchat.set_quiet(true);
    let daemon = bench.start();
    agrees(&sim, &bench).await;
    daemon.stop().await;
    assert!(!sim.our_api.stumbled(), "never two requests at once");
}
