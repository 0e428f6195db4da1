//! Modification times of a TOC: RFC 3339 text to and from seconds since the epoch.
//!
//! Upstream writes whole seconds in UTC (`2023-11-14T22:13:20Z`) and leaves the text away for the epoch itself; readers
//! must take fractions and zone offsets too, as the RFC has them. What is written has years of four digits, whatever the time: Go's
//! readers refuse the whole TOC for any other. What is read may have any year, since other writers do not look. The calendar is the proleptic Gregorian one; days are
//! counted with years that start in March, so that the leap day is the last day of its year.

const SECONDS_PER_DAY: i64 = 86_400;
/// Days of 400 Gregorian years, after which the calendar repeats.
const DAYS_PER_ERA: i64 = 146_097;
/// Days from 0000-03-01 to 1970-01-01.
const EPOCH: i64 = 719_468;
/// Digits of the farthest year that 64 bits of seconds reach.
const YEAR_DIGITS: usize = 12;

/// 0000-01-01T00:00:00Z in seconds since the epoch: the first second that RFC 3339 can tell, which has years of four digits.
const FIRST: i64 = -62_167_219_200;
/// 9999-12-31T23:59:59Z in seconds since the epoch: the last one.
const LAST: i64 = 253_402_300_799;

/// Whether RFC 3339 can tell a time of so many seconds since the epoch.
pub fn is_tellable(seconds: i64) -> bool {
    (FIRST..=LAST).contains(&seconds)
}

/// The whole second that stands in a TOC of whole seconds for a time: rounded (half a second up), but for the second of the epoch,
/// and cut to the years 0000 to 9999, since Go's readers refuse the whole TOC for any other one.
pub fn rounded(seconds: i64, nanoseconds: u32) -> i64 {
    let half = seconds != 0 && nanoseconds >= 500_000_000;
    seconds.saturating_add(i64::from(half)).clamp(FIRST, LAST)
}

/// The time that stands in a TOC with fractions for a time: the same, but cut to the years 0000 to 9999.
pub fn cut(seconds: i64, nanoseconds: u32) -> (i64, u32) {
    if is_tellable(seconds) {
        (seconds, nanoseconds)
    } else {
        (seconds.clamp(FIRST, LAST), 0)
    }
}

/// 0001-01-01T00:00:00Z in seconds since the epoch: what Go's writers make of a time that nobody set, and readers of no time.
pub const GO_ZERO: i64 = -62_135_596_800;

/// Whether a TOC that says `told` of a file may stand for a tar stream that says `given`. `is_fine`: the TOC has fractions of seconds;
/// without them, writers round or cut them off.
pub fn may_tell(told: (i64, u32), given: (i64, u32), is_fine: bool) -> bool {
    let (seconds, nanoseconds) = match given {
        (GO_ZERO, nanoseconds) => (0, nanoseconds),
        given => given,
    };
    if is_fine {
        return told == (seconds, nanoseconds) || told == cut(seconds, nanoseconds);
    }
    let half = i64::from(nanoseconds >= 500_000_000);
    [
        seconds,
        seconds.saturating_add(half),
        rounded(seconds, nanoseconds),
    ]
    .contains(&told.0)
}

/// Formats a time as upstream does, as [`rounded`] has it, in UTC; empty for the second of the epoch.
pub fn format(seconds: i64, nanoseconds: u32) -> String {
    match seconds {
        0 => String::new(),
        _ => text(rounded(seconds, nanoseconds)),
    }
}

/// The text of a second that can be told.
fn text(seconds: i64) -> String {
    let (days, second) = (
        seconds.div_euclid(SECONDS_PER_DAY),
        seconds.rem_euclid(SECONDS_PER_DAY),
    );
    let (year, month, day) = date(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// Formats a time with its fraction, as Go's `RFC3339Nano` does: no more digits than needed. Cut as [`cut`] has it.
pub fn format_exactly(seconds: i64, nanoseconds: u32) -> String {
    let (seconds, nanoseconds) = cut(seconds, nanoseconds);
    let whole = text(seconds);
    if nanoseconds == 0 {
        return whole;
    }
    let fraction = format!("{nanoseconds:09}");
    format!(
        "{}.{}Z",
        whole.trim_end_matches('Z'),
        fraction.trim_end_matches('0')
    )
}

/// Parses a time to seconds and nanoseconds since the epoch; `None` if the text is not RFC 3339. Years may have more than
/// four digits and a sign: other writers tell the times that tar can hold like that.
pub fn parse(text: &str) -> Option<(i64, u32)> {
    parse_usual(text.as_bytes()).or_else(|| parse_any(text))
}

/// As [`parse`], of what nearly every time looks like: `YYYY-MM-DDThh:mm:ssZ`.
fn parse_usual(text: &[u8]) -> Option<(i64, u32)> {
    let &[
        y1,
        y2,
        y3,
        y4,
        b'-',
        o1,
        o2,
        b'-',
        d1,
        d2,
        b'T',
        h1,
        h2,
        b':',
        m1,
        m2,
        b':',
        s1,
        s2,
        b'Z',
    ] = text
    else {
        return None;
    };
    let pair = |tens: u8, ones: u8| -> Option<i64> {
        let (tens, ones) = (tens.wrapping_sub(b'0'), ones.wrapping_sub(b'0'));
        (tens < 10 && ones < 10).then(|| i64::from(tens) * 10 + i64::from(ones))
    };
    let year = pair(y1, y2)? * 100 + pair(y3, y4)?;
    let (month, day) = (pair(o1, o2)?, pair(d1, d2)?);
    let (hour, minute, second) = (pair(h1, h2)?, pair(m1, m2)?, pair(s1, s2)?);
    let possible = (1..=12).contains(&month)
        && day >= 1
        && day <= days_in(year, month)
        && hour <= 23
        && minute <= 59
        && second <= 60;
    possible.then(|| {
        let second_of_day = hour * 3600 + minute * 60 + second;
        (days(year, month, day) * SECONDS_PER_DAY + second_of_day, 0)
    })
}

/// As [`parse`], of every text.
fn parse_any(text: &str) -> Option<(i64, u32)> {
    let (negative, rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (year, rest) = rest.split_once('-')?;
    if year.len() < 4 {
        return None;
    }
    let year = number(year)? * if negative { -1 } else { 1 };
    let (date_text, time_text) = rest.split_once(['T', 't'])?;
    let (month, day) = date_text.split_once('-')?;
    let (month, day) = (two_digits(month)?, two_digits(day)?);
    if !(1..=12).contains(&month) || day < 1 || day > days_in(year, month) {
        return None;
    }

    let zone_at = time_text.find(['Z', 'z', '+', '-'])?;
    let (clock, zone) = time_text.split_at_checked(zone_at)?;
    let (clock, fraction) = match clock.split_once('.') {
        Some((clock, fraction)) => (clock, Some(fraction)),
        None => (clock, None),
    };
    let mut fields = clock.split(':').map(two_digits);
    let (hour, minute, second) = (fields.next()??, fields.next()??, fields.next()??);
    if fields.next().is_some() || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let nanoseconds = fraction.map_or(Some(0), nanoseconds)?;
    let offset = match zone {
        "Z" | "z" => 0,
        _ => {
            let (sign, clock) = zone.split_at_checked(1)?;
            let (hours, minutes) = clock.split_once(':')?;
            let (hours, minutes) = (two_digits(hours)?, two_digits(minutes)?);
            if hours > 23 || minutes > 59 {
                return None;
            }
            (hours * 3600 + minutes * 60) * if sign == "-" { -1 } else { 1 }
        }
    };
    // Days first towards zero, so that the earliest times do not overflow on the way.
    let second_of_day = hour * 3600 + minute * 60 + second - offset;
    let day = days(year, month, day);
    let seconds = if day < 0 {
        (day + 1)
            .checked_mul(SECONDS_PER_DAY)?
            .checked_add(second_of_day - SECONDS_PER_DAY)?
    } else {
        day.checked_mul(SECONDS_PER_DAY)?.checked_add(second_of_day)?
    };
    Some((seconds, nanoseconds))
}

/// A run of ASCII digits, short enough not to overflow.
fn number(text: &str) -> Option<i64> {
    let plain =
        !text.is_empty() && text.len() <= YEAR_DIGITS && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| plain)
}

fn two_digits(text: &str) -> Option<i64> {
    number(text).filter(|_| text.len() == 2)
}

/// The digits after the decimal point; what is below a nanosecond is cut off.
fn nanoseconds(fraction: &str) -> Option<u32> {
    let plain = !fraction.is_empty() && fraction.bytes().all(|byte| byte.is_ascii_digit());
    let digits = fraction.bytes().chain(std::iter::repeat(b'0')).take(9);
    plain.then(|| digits.fold(0, |sum, digit| sum * 10 + u32::from(digit - b'0')))
}

fn is_leap(year: i64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

fn days_in(year: i64, month: i64) -> i64 {
    match month {
        2 if is_leap(year) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days from the epoch to a date.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = year - i64::from(month <= 2);
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * DAYS_PER_ERA + day_of_era - EPOCH
}

/// The date (year, month, day) that lies `days` after the epoch.
fn date(days: i64) -> (i64, i64, i64) {
    let days = days + EPOCH;
    let (era, day_of_era) = (days.div_euclid(DAYS_PER_ERA), days.rem_euclid(DAYS_PER_ERA));
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / (DAYS_PER_ERA - 1)) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = (shifted + 2) % 12 + 1;
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn known_times() {
        for (text, seconds) in [
            ("2023-11-14T22:13:20Z", 1_700_000_000),
            ("1970-01-01T00:00:01Z", 1),
            ("1969-12-31T23:59:59Z", -1),
            ("2000-02-29T12:00:00Z", 951_825_600),
            ("1900-03-01T00:00:00Z", -2_203_891_200),
            ("0001-01-01T00:00:00Z", -62_135_596_800),
            ("0000-01-01T00:00:00Z", FIRST),
            ("9999-12-31T23:59:59Z", LAST),
        ] {
            assert_eq!(parse(text), Some((seconds, 0)), "{text}");
            assert_eq!(format(seconds, 0), text);
        }
    }

    #[test]
    fn years_of_other_than_four_digits_are_read_and_never_written() {
        let (first, last) = ("0000-01-01T00:00:00Z", "9999-12-31T23:59:59Z");
        for (text, seconds) in [
            ("10000-01-01T00:00:00Z", LAST + 1),
            ("-0001-12-31T23:59:59Z", FIRST - 1),
            ("292277026596-12-04T15:30:07Z", i64::MAX),
        ] {
            assert_eq!(parse(text), Some((seconds, 0)), "{text}");
            let cut_off = if seconds < 0 { first } else { last };
            for nanoseconds in [0, 499_999_999, 999_999_999] {
                assert_eq!(format(seconds, nanoseconds), cut_off);
                assert_eq!(format_exactly(seconds, nanoseconds), cut_off);
            }
        }
        // Rounding must not lead there.
        assert_eq!(format(LAST, 999_999_999), last);
        assert_eq!(format_exactly(LAST, 5), "9999-12-31T23:59:59.000000005Z");
        assert_eq!(format(FIRST - 1, 500_000_000), first);
        assert_eq!(format(i64::MIN, 0), first);
    }

    #[test]
    fn what_a_toc_may_say_of_a_time() {
        for (told, given, is_fine, may) in [
            ((7, 0), (7, 0), true, true),
            ((7, 0), (7, 1), true, false),
            ((7, 0), (7, 1), false, true),
            ((8, 0), (7, 500_000_000), false, true),
            ((7, 0), (7, 500_000_000), false, true),
            ((8, 0), (7, 499_999_999), false, false),
            ((LAST, 0), (LAST + 1, 5), true, true),
            ((LAST, 0), (LAST + 1, 5), false, true),
            // As other writers have it.
            ((LAST + 1, 0), (LAST + 1, 0), false, true),
            ((FIRST, 0), (i64::MIN, 0), true, true),
            ((LAST, 0), (LAST - 1, 0), true, false),
            ((0, 0), (GO_ZERO, 0), true, true),
            ((0, 0), (GO_ZERO, 0), false, true),
            ((0, 0), (LAST + 1, 0), false, false),
        ] {
            assert_eq!(may_tell(told, given, is_fine), may, "{told:?} {given:?}");
        }
    }

    #[test]
    fn fractions_and_zones_are_read() {
        for (text, parsed) in [
            ("1970-01-01T00:00:00.5Z", (0, 500_000_000)),
            ("1970-01-01T00:00:00.1234567899Z", (0, 123_456_789)),
            ("1970-01-01t01:00:00z", (3600, 0)),
            ("1970-01-01T01:00:00+01:00", (0, 0)),
            ("1969-12-31T22:30:00-01:30", (0, 0)),
            ("1972-06-30T23:59:60Z", (78_796_800, 0)),
        ] {
            assert_eq!(parse(text), Some(parsed), "{text}");
        }
    }

    #[test]
    fn times_are_rounded_and_the_epoch_is_empty() {
        for (seconds, nanoseconds, text) in [
            (0, 0, ""),
            (0, 999_999_999, ""),
            (1, 499_999_999, "1970-01-01T00:00:01Z"),
            (1, 500_000_000, "1970-01-01T00:00:02Z"),
            (-1, 500_000_000, "1970-01-01T00:00:00Z"),
        ] {
            assert_eq!(format(seconds, nanoseconds), text, "{seconds}.{nanoseconds}");
        }
    }

    #[test]
    fn fractions_are_kept_where_they_are_wanted() {
        for (seconds, nanoseconds, text) in [
            (1_700_000_000, 123_456_789, "2023-11-14T22:13:20.123456789Z"),
            (1_700_000_000, 0, "2023-11-14T22:13:20Z"),
            (0, 500_000_000, "1970-01-01T00:00:00.5Z"),
            (-1, 1000, "1969-12-31T23:59:59.000001Z"),
        ] {
            assert_eq!(format_exactly(seconds, nanoseconds), text);
            assert_eq!(parse(text), Some((seconds, nanoseconds)));
        }
    }

    #[test]
    fn other_texts_are_refused() {
        for text in [
            "",
            "2023",
            "2023-11-14",
            "2023-11-14T22:13:20",
            "2023-11-14 22:13:20Z",
            "2023-13-14T22:13:20Z",
            "2023-02-29T22:13:20Z",
            "2023-00-01T22:13:20Z",
            "2023-01-00T22:13:20Z",
            "2023-1-14T22:13:20Z",
            "2023-11-14T24:13:20Z",
            "2023-11-14T22:60:20Z",
            "2023-11-14T22:13:61Z",
            "2023-11-14T22:13:20.Z",
            "2023-11-14T22:13:20.5xZ",
            "2023-11-14T22:13:20+1:00",
            "2023-11-14T22:13:20+01:00Z",
            "2023-11-14T22:13:20Zx",
            "+023-11-14T22:13:20Z",
            "999999999999-11-14T22:13:20Z",
            "9999999999999-11-14T22:13:20Z",
        ] {
            assert_eq!(parse(text), None, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn round_trip(
            seconds in prop_oneof![any::<i64>(), FIRST..LAST, -5_000_000_000i64..5_000_000_000, Just(i64::MIN), Just(i64::MAX)],
            nanoseconds in 0u32..1_000_000_000,
        ) {
            let exact = format_exactly(seconds, nanoseconds);
            prop_assert_eq!(parse(&exact), Some(cut(seconds, nanoseconds)), "{}", exact);
            prop_assert!(exact.as_bytes()[..4].iter().all(u8::is_ascii_digit), "{}", exact);
            prop_assume!(seconds != 0);
            let text = format(seconds, nanoseconds);
            prop_assert_eq!(parse(&text), Some((rounded(seconds, nanoseconds), 0)), "{}", text);
            prop_assert!(text.len() == 20, "{}", text);
        }

        #[test]
        fn days_follow_one_another(day in -400_000_000i64..400_000_000) {
            let (year, month, of_month) = date(day);
            prop_assert_eq!(days(year, month, of_month), day);
            prop_assert!(of_month >= 1 && of_month <= days_in(year, month));
        }

        #[test]
        fn every_time_formats(seconds in any::<i64>(), nanoseconds in 0u32..1_000_000_000) {
            prop_assert_eq!(format(seconds, nanoseconds).is_empty(), seconds == 0);
        }

        #[test]
        fn noise_never_panics(text in "\\PC{0,40}|[-0-9TZ:.+]{0,40}") {
            let _outcome = parse(&text);
        }

        #[test]
        fn usual_times_are_no_exception(
            text in "[0-9]{4}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-6][0-9]:[0-6][0-9]Z|[0-9]{2}[-0-9]{2}-1[0-9]-2[0-9]T1[:0-9]:1[0-9]:1[0-9]Z"
        ) {
            prop_assert_eq!(parse(&text), parse_any(&text));
        }
    }
}
