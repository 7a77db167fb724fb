//! The names of the two APIs.

use std::fmt;

use crate::settings::{BIGCHAT_TOKEN, OUR_API_TOKEN};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Api {
    BigChat,
    OurApi,
}

impl Api {
    pub const ALL: [Self; 2] = [Self::BigChat, Self::OurApi];

    /// In messages.
    pub fn title(self) -> &'static str {
        match self {
            Self::BigChat => "BigChat",
            Self::OurApi => "OurAPI",
        }
    }

    /// In the journal and as a label.
    pub fn name(self) -> &'static str {
        match self {
            Self::BigChat => "bigchat",
            Self::OurApi => "our_api",
        }
    }

    /// The setting with the base URL.
    pub fn url_setting(self) -> &'static str {
        match self {
            Self::BigChat => "--bigchat-url",
            Self::OurApi => "--our-api-url",
        }
    }

    /// The setting with the credentials.
    pub fn token_setting(self) -> &'static str {
        match self {
            Self::BigChat => BIGCHAT_TOKEN,
            Self::OurApi => OUR_API_TOKEN,
        }
    }
}

impl fmt::Display for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.title())
    }
}
