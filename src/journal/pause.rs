//! Pauses of deliveries: commands and the console record them here, and the process that delivers obeys them.

use rusqlite::{Connection, params};

use super::{Result, Store};
use crate::domain::pause::Pause;
use crate::domain::time::Millis;

impl Store {
    /// The latest pause, unless it was ended. It may have expired.
    pub fn pause(&mut self) -> Result<Option<Pause>> {
        Ok(latest(&self.connection)?.0)
    }

    /// Pauses deliveries, and replaces any earlier pause.
    pub fn set_pause(&mut self, pause: Pause) -> Result<()> {
        self.connection.execute(
            "UPDATE control SET paused_at = ?1, paused_until = ?2, resumed_at = NULL",
            params![pause.since, pause.until],
        )?;
        Ok(())
    }

    /// Ends a pause, unless another has replaced it.
    pub fn end_pause(&mut self, pause: Pause, now: Millis) -> Result<()> {
        self.connection.execute(
            "UPDATE control SET resumed_at = ?1 WHERE paused_at = ?2 AND paused_until IS ?3",
            params![now, pause.since, pause.until],
        )?;
        Ok(())
    }
}

/// The latest pause, unless it was ended, and when it was ended, if it was.
pub(super) fn latest(connection: &Connection) -> Result<(Option<Pause>, Option<Millis>)> {
    let mut statement =
        connection.prepare_cached("SELECT paused_at, paused_until, resumed_at FROM control")?;
    Ok(statement.query_row([], |row| {
        let (since, until): (Option<Millis>, _) = (row.get(0)?, row.get(1)?);
        let resumed_at: Option<Millis> = row.get(2)?;
        let pause = since.map(|since| Pause { since, until });
        Ok((pause.filter(|_| resumed_at.is_none()), resumed_at))
    })?)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn ended_pause_stays_ended() {
        let memory = Connection::open_in_memory().expect("a database");
        let mut store = Store::in_memory(memory, true).expect("a schema");
        assert_eq!(store.pause().expect("a row"), None);
        let first = Pause::begin(Some(HOUR), Millis(1_000));
        let second = Pause::begin(None, Millis(2_000));
        store.set_pause(first).expect("a row");
        store.set_pause(second).expect("a row");
        store.end_pause(first, Millis(3_000)).expect("a row");
        assert_eq!(store.pause().expect("a row"), Some(second), "replaced");
        store.end_pause(second, Millis(3_000)).expect("a row");
        assert_eq!(store.pause().expect("a row"), None);
        store.set_pause(first).expect("a row");
        assert_eq!(store.pause().expect("a row"), Some(first), "paused again");
    }
}
