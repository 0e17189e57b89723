//! Who acts first, without a word between the instances: rendezvous hashing.
//!
//! Everybody computes the same order of the same candidates, and a candidate that goes or comes
//! leaves the order of the others as it is.

use super::facts::InstanceId;

/// How many of the candidates come before `own` in what is about `subject`; 0 is the first. `own`
/// may be among the candidates or not.
pub fn rank<'a>(
    subject: &str,
    own: &InstanceId,
    candidates: impl IntoIterator<Item = &'a InstanceId>,
) -> u32 {
    let mine = (weight(subject, own), own);
    let before = candidates
        .into_iter()
        .filter(|other| *other != own && (weight(subject, other), *other) > mine);
    u32::try_from(before.count()).unwrap_or(u32::MAX)
}

/// FNV-1a (64 bits) over both, and the finaliser of `SplitMix64`, without which ids that differ in
/// their last digits alone would keep their order for every subject. The same in every version: two
/// of them meet in one fleet during an upgrade.
fn weight(subject: &str, candidate: &InstanceId) -> u64 {
    let bytes = subject.bytes().chain([0]).chain(candidate.as_str().bytes());
    let mut hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(count: usize) -> Vec<InstanceId> {
        (0..count)
            .map(|n| InstanceId::new(format!("i-{n:017x}")))
            .collect()
    }

    #[test]
    fn everybody_has_a_place_of_their_own_and_it_depends_on_the_subject() {
        let all = ids(20);
        let mut firsts = std::collections::BTreeSet::new();
        for subject in ["i-dead1", "i-dead2", "i-dead3", "i-dead4", "i-dead5"] {
            let mut ranks: Vec<u32> = all.iter().map(|id| rank(subject, id, &all)).collect();
            firsts.insert(ranks.iter().position(|rank| *rank == 0));
            ranks.sort_unstable();
            assert_eq!(ranks, (0..20).collect::<Vec<u32>>(), "{subject}");
        }
        assert!(firsts.len() > 1, "one instance does all the work");
    }

    #[test]
    fn one_that_goes_leaves_the_order_of_the_others() {
        let all = ids(12);
        let order = |ids: &[InstanceId]| {
            let mut order = ids.to_vec();
            order.sort_by_key(|id| rank("subject", id, ids));
            order
        };
        let mut without = order(&all);
        without.retain(|id| *id != all[5]);
        let rest: Vec<InstanceId> = all.iter().filter(|id| **id != all[5]).cloned().collect();
        assert_eq!(order(&rest), without);
    }
}
