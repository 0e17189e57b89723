//! An upstream at several places, of which some fail.

mod support;

use support::agent::Setup;
use support::image::Image;
use support::upstream::{ALWAYS, Fault, On, Upstream};

#[test]
fn the_next_place_is_asked_where_one_fails() {
    let image = Image::small(1);
    let (first, second) = (Upstream::start(), Upstream::start());
    second.push("library/app", "latest", &image);
    let targets = [
        "/v2/library/app/manifests/latest",
        "/v2/library/app/tags/list",
    ];
    for fault in [404, 401, 429, 500] {
        first.fault(ALWAYS, On::any("/v2/"), Fault::Status(fault));
        let agent = Setup::mirror(&first)
            .at(&[first.url(), second.url()])
            .start();
        for target in targets {
            assert_eq!(agent.get(target).status, 200, "{fault}: {target}");
        }
        agent.pull("library/app", "latest", &image);
        first.heal();
    }
    first.switch_off();
    let agent = Setup::mirror(&first)
        .at(&[first.url(), second.url()])
        .start();
    agent.pull("library/app", "latest", &image);
}

#[test]
fn what_no_place_has_is_not_there_and_what_some_can_not_say_is_not_known() {
    let (first, second) = (Upstream::start(), Upstream::start());
    let agent = Setup::mirror(&first)
        .at(&[first.url(), second.url()])
        .start();
    let target = "/v2/library/app/manifests/latest";
    agent.get(target).assert_error(404, "MANIFEST_UNKNOWN");
    for (down, up) in [(&first, &second), (&second, &first)] {
        down.switch_off();
        agent.get(target).assert_error(503, "UNAVAILABLE");
        down.switch_on();
        up.heal();
    }
}
