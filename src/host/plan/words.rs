//! Command lines and environment files as systemd reads them (systemd.exec(5), systemd.service(5)).
//!
//! An environment file is not a shell script: `OPTIONS="$OPTIONS --debug"` gives docker the word
//! `$OPTIONS`. So it is read here by systemd's own rules (`parse_env_file_internal` of
//! `src/basic/env-file.c`), and an edit replaces the words that it is about, inside the quotes that
//! are there.

use std::ops::Range;

/// A word, and which bytes of the file it is written with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Word {
    pub text: String,
    pub raw: Range<usize>,
}

/// A character of a value, and where it is written.
#[derive(Debug, Clone)]
struct Char {
    value: char,
    raw: Range<usize>,
}

/// The words of the last assignment to this variable; `None` where the file has none.
pub(super) fn variable(file: &str, name: &str) -> Option<Vec<Word>> {
    assignments(file)
        .into_iter()
        .rfind(|(key, _)| key == name)
        .map(|(_, value)| words(&value))
}

/// Every assignment, in the file's order: the last one to a variable counts.
pub(in crate::host) fn all(file: &str) -> impl Iterator<Item = (String, String)> {
    let text = |value: Vec<Char>| value.iter().map(|it| it.value).collect();
    let found = assignments(file).into_iter();
    found.map(move |(key, value)| (key, text(value)))
}

/// The value of the last assignment to this variable.
pub(super) fn value(file: &str, name: &str) -> Option<String> {
    let found = assignments(file).into_iter().rfind(|(key, _)| key == name);
    found.map(|(_, value)| value.iter().map(|it| it.value).collect())
}

fn assignments(file: &str) -> Vec<(String, Vec<Char>)> {
    let mut found = Vec::new();
    let mut chars = file.char_indices().peekable();
    while let Some(&(start, first)) = chars.peek() {
        if first.is_ascii_whitespace() {
            chars.next();
            continue;
        }
        if first == '#' || first == ';' {
            skip_line(&mut chars);
            continue;
        }
        let mut key_end = None;
        for (at, c) in chars.by_ref() {
            if c == '=' {
                key_end = Some(at);
            }
            if c == '=' || c == '\n' {
                break;
            }
        }
        let Some(key_end) = key_end else { continue };
        let value = read_value(file, &mut chars);
        found.push((file[start..key_end].trim_end().to_owned(), value));
    }
    found
}

type Chars<'a> = std::iter::Peekable<std::str::CharIndices<'a>>;

/// A comment ends with its line, unless a backslash is the last thing on it.
fn skip_line(chars: &mut Chars<'_>) {
    let mut escaped = false;
    for (_, c) in chars.by_ref() {
        if c == '\n' && !escaped {
            return;
        }
        escaped = c == '\\' && !escaped;
    }
}

fn read_value(file: &str, chars: &mut Chars<'_>) -> Vec<Char> {
    let mut value: Vec<Char> = Vec::new();
    // How much of it is quoted or not blank: blanks at the end of a line don't count.
    let mut kept = 0;
    let mut started = false;
    while let Some((at, c)) = chars.next() {
        let raw = at..at + c.len_utf8();
        match c {
            '\n' => break,
            '\\' => {
                started = true;
                if let Some((next_at, next)) = chars.next()
                    && next != '\n'
                {
                    value.push(Char {
                        value: next,
                        raw: at..next_at + next.len_utf8(),
                    });
                    kept = value.len();
                }
            }
            // Quotes count at the start of the value and after another quoted part.
            '\'' | '"' if !started => {
                read_quoted(file, c, chars, &mut value);
                kept = value.len();
            }
            blank if blank.is_ascii_whitespace() && !started => {}
            other => {
                started = true;
                value.push(Char { value: other, raw });
                if !other.is_ascii_whitespace() {
                    kept = value.len();
                }
            }
        }
    }
    value.truncate(kept);
    value
}

fn read_quoted(file: &str, quote: char, chars: &mut Chars<'_>, value: &mut Vec<Char>) {
    while let Some((at, c)) = chars.next() {
        if c == quote {
            return;
        }
        if c == '\\' && quote == '"' {
            let Some((next_at, next)) = chars.next() else {
                return;
            };
            let raw = at..next_at + next.len_utf8();
            match next {
                '"' | '\\' | '`' | '$' => value.push(Char { value: next, raw }),
                '\n' => {}
                other => {
                    value.push(Char {
                        value: '\\',
                        raw: at..next_at,
                    });
                    value.push(Char {
                        value: other,
                        raw: next_at..file.len().min(raw.end),
                    });
                }
            }
            continue;
        }
        value.push(Char {
            value: c,
            raw: at..at + c.len_utf8(),
        });
    }
}

/// `$OPTIONS` as a word of its own: split at blanks, quotes respected and taken away.
fn words(value: &[Char]) -> Vec<Word> {
    let mut found: Vec<Word> = Vec::new();
    let mut current: Option<Word> = None;
    let mut quote = None;
    let mut chars = value.iter();
    while let Some(Char { value: c, raw }) = chars.next() {
        if quote.is_none() && c.is_ascii_whitespace() {
            found.extend(current.take());
            continue;
        }
        let word = current.get_or_insert_with(|| Word {
            text: String::new(),
            raw: raw.clone(),
        });
        word.raw.end = raw.end;
        match (*c, quote) {
            (c, Some(open)) if c == open => quote = None,
            ('\'' | '"', None) => quote = Some(*c),
            ('\\', None | Some('"')) => {
                if let Some(next) = chars.next() {
                    word.text.push(next.value);
                    word.raw.end = next.raw.end;
                }
            }
            (c, _) => word.text.push(c),
        }
    }
    found.extend(current);
    found
}

/// The words of a text that is in no file: `Environment=`.
pub(in crate::host) fn split(text: &str) -> Vec<String> {
    let chars: Vec<Char> = text
        .char_indices()
        .map(|(at, value)| Char {
            value,
            raw: at..at + value.len_utf8(),
        })
        .collect();
    words(&chars).into_iter().map(|word| word.text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_as_systemd_reads_it() {
        for (file, wanted) in [
            ("OPTIONS='--a --b=c'", &["--a", "--b=c"][..]),
            ("OPTIONS=\"--a --b\"\n", &["--a", "--b"]),
            ("OPTIONS=--a --b  \n", &["--a", "--b"]),
            ("  OPTIONS = --a\n", &["--a"]),
            ("#OPTIONS=--no\n; OPTIONS=--no\nOPTIONS=--a", &["--a"]),
            ("# goes on \\\nOPTIONS=--no\nOPTIONS=--a", &["--a"]),
            ("OPTIONS=--first\nOPTIONS=--last\n", &["--last"]),
            ("OPTIONS=--a \\\n  --b\n", &["--a", "--b"]),
            ("OPTIONS='--a \"b c\"'", &["--a", "b c"]),
            ("OPTIONS=\"--a=\\\"b c\\\"\"", &["--a=b c"]),
            ("OPTIONS=\"$OPTIONS --x\"", &["$OPTIONS", "--x"]),
            ("OPTIONS=", &[]),
            ("OPTIONS='--a''--b'", &["--a--b"]),
            ("OPTIONS=it's\n", &["its"]),
            ("junk\nOPTIONS=--a", &["--a"]),
            ("export OPTIONS=--no\nOPTIONS=--a", &["--a"]),
        ] {
            let found = variable(file, "OPTIONS").expect(file);
            let texts: Vec<&str> = found.iter().map(|word| word.text.as_str()).collect();
            assert_eq!(texts, wanted, "{file}");
        }
        assert_eq!(variable("OTHER=--a\n", "OPTIONS"), None);
    }

    #[test]
    fn a_word_knows_its_bytes() {
        let file = "A=1\nOPTIONS='--selinux-enabled --registry-mirror=http://x'\nB=2\n";
        let words = variable(file, "OPTIONS").unwrap();
        assert_eq!(&file[words[1].raw.clone()], "--registry-mirror=http://x");
    }
}
