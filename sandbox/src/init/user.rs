//! Who the program runs as: `user[:group]` looked up in the image's /etc/passwd and /etc/group, by Docker's rules.
//!
//! Called by the first process inside the new root. A pure function over the two files' contents.

use std::io;

use crate::wire::{At, Failure, Kind};

/// Largest id, by the kernel: -1 means "no change".
const ID_MAX: u32 = u32::MAX - 1;
/// Most supplementary groups that the kernel takes (`NGROUPS_MAX`).
const GROUPS_MAX: usize = 65_536;

/// A user with everything that the kernel and the environment want to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Account {
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Supplementary groups, the primary one first: a program that changes its effective group, as a set-group-id one does,
    /// would otherwise leave it, and with it what a file's mode denies to that group.
    pub(super) groups: Vec<u32>,
    /// Home directory; `/` where the image does not say.
    pub(super) home: Vec<u8>,
}

/// Finds the user. `read` gives a file's contents, `None` when it is not there. Rules: digits are an id, all else a name; a
/// name must be in /etc/passwd; an id need not be, and has group 0 then; a group that is given replaces the user's own and
/// its supplementary ones.
pub(super) fn find(
    wanted: &str,
    read: &dyn Fn(&str) -> io::Result<Option<Vec<u8>>>,
) -> Result<Account, Failure> {
    let mut account = look_up(wanted, read)?;
    let primary = account.gid;
    account.groups.retain(|group| *group != primary);
    account.groups.insert(0, primary);
    account.groups.truncate(GROUPS_MAX);
    Ok(account)
}

/// The account with the groups that /etc/group names.
fn look_up(wanted: &str, read: &dyn Fn(&str) -> io::Result<Option<Vec<u8>>>) -> Result<Account, Failure> {
    let (user, group) = wanted.split_once(':').unwrap_or((wanted, ""));
    let file = |path: &str| read(path).at(format!("reading {path} of the image"));
    let passwd = file("/etc/passwd")?.unwrap_or_default();
    let id = if user.is_empty() {
        Some(0)
    } else {
        number(user.as_bytes())
    };
    let entry = lines(&passwd, 7).find(|fields| {
        let [name, _, uid, ..] = fields.as_slice() else {
            return false;
        };
        // A number is never taken for a name: an image could give the name `1000` the id 0 (CVE-2016-3697).
        match id {
            Some(_) => number(uid) == id,
            None => *name == user.as_bytes(),
        }
    });
    let fields = entry.as_deref();
    let field = |index: usize| fields.and_then(|fields| fields.get(index)).copied();
    let uid = field(2)
        .and_then(number)
        .or(id)
        .ok_or_else(|| missing(format!("there is no {user:?} in the image's /etc/passwd")))?;
    let home = field(5).filter(|home| !home.is_empty()).unwrap_or(b"/").to_vec();
    let mut account = Account {
        uid,
        gid: field(3).and_then(number).unwrap_or(0),
        groups: Vec::new(),
        home,
    };
    if group.is_empty() && fields.is_none() {
        return Ok(account);
    }
    let groups = file("/etc/group")?.unwrap_or_default();
    let gid = |fields: &[&[u8]]| fields.get(2).copied().and_then(number);
    if group.is_empty() {
        let name = field(0).unwrap_or_default();
        let member = |fields: &Vec<&[u8]>| {
            fields
                .get(3)
                .is_some_and(|members| members.split(|byte| *byte == b',').any(|member| member == name))
        };
        account.groups = lines(&groups, 4)
            .filter(member)
            .filter_map(|fields| gid(&fields))
            .take(GROUPS_MAX)
            .collect();
    } else {
        let asked = number(group.as_bytes());
        let named = lines(&groups, 4)
            .find(|fields| fields.first() == Some(&group.as_bytes()))
            .and_then(|fields| gid(&fields));
        account.gid = asked
            .or(named)
            .ok_or_else(|| missing(format!("there is no {group:?} in the image's /etc/group")))?;
    }
    Ok(account)
}

fn missing(reason: String) -> Failure {
    Failure::new(Kind::User, reason, libc::ENOENT)
}

/// A decimal id that the kernel takes.
fn number(text: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(text).ok()?;
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    text.parse().ok().filter(|id| *id <= ID_MAX)
}

/// Lines of colon-separated fields with at most `count` of them; comments and empty lines are left out.
fn lines(contents: &[u8], count: usize) -> impl Iterator<Item = Vec<&[u8]>> {
    contents
        .split(|byte| *byte == b'\n')
        .map(<[u8]>::trim_ascii)
        .filter(|line| !line.is_empty() && !line.starts_with(b"#"))
        .map(move |line| line.splitn(count, |byte| *byte == b':').collect())
}

#[cfg(test)]
mod tests {
    use std::io;

    use proptest::prelude::{any, proptest};

    use super::{Account, find};
    use crate::wire::Kind;

    const PASSWD: &str = "# comment\nroot:x:0:0:root:/root:/bin/sh\n\nwww:x:33:34:web:/srv:/bin/false\n\
                          123:x:77:78::/odd:\nbroken\nbig:x:4294967295:0::/:\n";
    const GROUP: &str = "root:x:0:root\nweb:x:34:\nadm:x:4:root,www\nlog:x:5:www\nbad:x::www\n";

    fn read(path: &str) -> io::Result<Option<Vec<u8>>> {
        Ok(match path {
            "/etc/passwd" => Some(PASSWD.as_bytes().to_vec()),
            "/etc/group" => Some(GROUP.as_bytes().to_vec()),
            _ => None,
        })
    }

    #[test]
    fn users_by_name_and_id() {
        let rows: [(&str, u32, u32, &[u32], &str); 11] = [
            ("", 0, 0, &[0, 4], "/root"),
            ("root", 0, 0, &[0, 4], "/root"),
            ("www", 33, 34, &[34, 4, 5], "/srv"),
            ("33", 33, 34, &[34, 4, 5], "/srv"),
            ("www:log", 33, 5, &[5], "/srv"),
            ("www:9", 33, 9, &[9], "/srv"),
            ("1000", 1000, 0, &[0], "/"),
            ("1000:web", 1000, 34, &[34], "/"),
            (":adm", 0, 4, &[4], "/root"),
            ("123", 123, 0, &[0], "/"),
            ("77", 77, 78, &[78], "/odd"),
        ];
        for (wanted, uid, gid, groups, home) in rows {
            let expected = Account {
                uid,
                gid,
                groups: groups.to_vec(),
                home: home.into(),
            };
            assert_eq!(find(wanted, &read).unwrap(), expected, "{wanted}");
        }
        for wanted in [
            "nobody",
            "www:nogroup",
            "4294967295",
            "-1",
            "+1",
            "big",
            "broken",
            "bad:bad",
        ] {
            assert_eq!(find(wanted, &read).unwrap_err().kind, Kind::User, "{wanted}");
        }
    }

    #[test]
    fn without_files_only_ids_work() {
        let none = |_: &str| Ok(None);
        assert_eq!(find("", &none).unwrap().home, b"/");
        assert_eq!(find("5:6", &none).unwrap().gid, 6);
        assert!(find("root", &none).is_err());
        let broken = |_: &str| Err(io::Error::from_raw_os_error(libc::EIO));
        let failure = find("root", &broken).unwrap_err();
        assert_eq!((failure.kind, failure.errno), (Kind::Step, libc::EIO));
    }

    proptest! {
        #[test]
        fn never_panics(wanted in "[a-z0-9:]{0,12}", passwd in any::<Vec<u8>>(), group in any::<Vec<u8>>()) {
            let read = |path: &str| Ok(Some(if path == "/etc/passwd" { passwd.clone() } else { group.clone() }));
            let _unused = find(&wanted, &read);
        }
    }
}
