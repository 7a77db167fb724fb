//! Ids, each a separate type, so that one cannot be passed as another.

use std::fmt;

use rusqlite::types::{FromSql, FromSqlResult, ToSql, ToSqlOutput, ValueRef};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub i64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl ToSql for $name {
            fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
                self.0.to_sql()
            }
        }

        impl FromSql for $name {
            fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
                i64::column_result(value).map(Self)
            }
        }
    };
}

id! {
    /// An event in the journal. Ids grow in order of arrival and are never reused.
    EventId
}
id! {
    /// A conversation in the journal. BigChat's own id may mean another conversation in another epoch.
    ConversationId
}
id! {
    /// An advisor, by BigChat's id, which may mean another advisor in another epoch.
    AdvisorId
}
id! {
    /// A request to verify chats, or a pass in idle time. Ids grow and are never reused.
    VerificationId
}
id! {
    /// The period from one restart of BigChat to the next.
    Epoch
}
