//! The state of both APIs, which the daemon stores for commands, the console and its next session.

use rusqlite::{Connection, OptionalExtension, params};

use super::{Result, Store};
use crate::http::{Api, ApiStatus, RateLimit};

impl Store {
    /// Stores the state of each API to which a request was made.
    pub fn record_api_status(&mut self, apis: &[(Api, ApiStatus)]) -> Result<()> {
        let transaction = self.begin()?;
        for (api, status) in apis {
            let Some(asked_at) = status.asked_at else {
                continue;
            };
            transaction
                .prepare_cached(
                    "INSERT OR REPLACE INTO api_status (name, state, since, problem, lasts,
                        limited_at, limited_until, limited_by, asked_at, request, response)
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
                )?
                .execute(params![
                    api.name(),
                    status.state,
                    status.since,
                    status.problem,
                    status.lasts,
                    status.rate_limit.map(|limit| limit.at),
                    status.rate_limit.map(|limit| limit.until),
                    status.rate_limit.map(|limit| limit.status),
                    asked_at,
                    status.request.as_deref().unwrap_or_default(),
                    status.response.as_deref().unwrap_or_default(),
                ])?;
        }
        Ok(transaction.commit()?)
    }

    /// Deletes the state of an API.
    pub fn forget_api(&mut self, api: Api) -> Result<()> {
        self.connection
            .execute("DELETE FROM api_status WHERE name = ?1", [api.name()])?;
        Ok(())
    }

    /// The stored state of an API.
    pub fn api(&mut self, api: Api) -> Result<ApiStatus> {
        of(&self.connection, api)
    }
}

pub(super) fn of(connection: &Connection, api: Api) -> Result<ApiStatus> {
    let status = connection
        .prepare_cached(
            "SELECT state, since, problem, lasts, limited_at, limited_until, limited_by, asked_at, request, response
             FROM api_status WHERE name = ?1",
        )?
        .query_row([api.name()], |row| {
            let limit = (row.get(4)?, row.get(5)?, row.get(6)?);
            Ok(ApiStatus {
                state: row.get(0)?,
                since: row.get(1)?,
                problem: row.get(2)?,
                lasts: row.get(3)?,
                rate_limit: match limit {
                    (Some(at), Some(until), Some(status)) => Some(RateLimit { at, until, status }),
                    _ => None,
                },
                asked_at: row.get(7)?,
                request: row.get(8)?,
                response: row.get(9)?,
            })
        })
        .optional()?;
    Ok(status.unwrap_or_default())
}
