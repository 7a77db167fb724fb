//! The whole daemon against the simulated services, with restarts in between.

use bigchat_sync::sim::{self, Sim, bigchat};

use crate::harness::{Bench, until};

async fn sim(options: bigchat::Options) -> (Sim, Bench) {
    let options = sim::Options {
        bigchat: options,
        ..sim::Options::default()
    };
    let sim = Sim::start(options).await.expect("the services");
    let bench = Bench::new(&sim.bigchat_url(), &sim.our_api_url());
    (sim, bench)
}

/// Waits until what BigChat told stands in OurAPI.
async fn agrees(sim: &Sim) {
    let mut report = String::new();
    until("no difference", async || {
        let compared = sim.compare();
        report = compared.to_string();
        compared.is_clean() && compared.chats() > 0
    })
    .await;
}

#[tokio::test]
async fn what_happened_stands_in_our_api_across_restarts() {
    let (sim, bench) = sim(bigchat::Options {
        seed: 7,
        ..bigchat::Options::default()
    })
    .await;
    for _ in 0..5 {
        let told = sim.bigchat.told().len();
        let daemon = bench.start();
        until("more events", async || sim.bigchat.told().len() > told + 40).await;
        daemon.stop().await;
    }
    sim.bigchat.set_quiet(true);
    let daemon = bench.start();
    agrees(&sim).await;
    daemon.stop().await;
    assert_eq!(
        sim.our_api.traffic.max_in_flight(),
        1,
        "one request at a time"
    );
    assert_eq!(sim.compare().fallbacks(), 0);
}
