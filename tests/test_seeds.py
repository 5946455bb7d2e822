import itertools

import numpy as np
import pytest

from optuna_ohgw.seeds import Purpose, derive_seed

# Frozen when the package was written: a change here changes every published study.
GOLDEN = [
    (0, Purpose.SPLIT, (), 4334430513956379144),
    (0, Purpose.SUGGEST, (), 8226343694796210948),
    (0, Purpose.WEIGHTS, (0,), 2870757765332765563),
    (0, Purpose.WEIGHTS, (1,), 6931203489060459394),
    (1, Purpose.WEIGHTS, (0,), 2993259647479117983),
    (42, Purpose.ORDER, (3, 7), 1762096155324686048),
    (42, Purpose.ORDER, (7, 3), 7897186836034207103),
    (2**31, Purpose.CONTROL, (12, 0), 4590452536573028057),
    (2**63 - 1, Purpose.STRUCTURE, (1, 2, 3), 853742724397626239),
    (7, Purpose.LABEL_NOISE, (), 2021251017632032385),
    (7, Purpose.AUGMENT, (5,), 7160647954095680071),
    (7, Purpose.MODEL, (5,), 4772522023257145116),
    (7, Purpose.WARM_START, (5,), 5860861981186233765),
]


@pytest.mark.parametrize(("seed", "purpose", "key", "expected"), GOLDEN)
def test_seeds_never_change(seed, purpose, key, expected):
    assert derive_seed(seed, purpose, *key) == expected


def test_the_values_of_purposes_never_change():
    assert {p.name: p.value for p in Purpose}.items() >= {
        "SPLIT": 0,
        "LABEL_NOISE": 1,
        "SUGGEST": 2,
        "WEIGHTS": 3,
        "ORDER": 4,
        "AUGMENT": 5,
        "MODEL": 6,
        "WARM_START": 7,
        "CONTROL": 8,
        "STRUCTURE": 9,
    }.items()


def test_different_seeds_purposes_and_keys_give_different_streams():
    keys = [(), *itertools.product(range(8)), *itertools.product(range(8), range(8))]
    seeds = [derive_seed(s, p, *k) for s in range(4) for p in Purpose for k in keys]
    # 2920 draws from 2**63: a collision by chance has probability 5e-13
    assert len(set(seeds)) == len(seeds) == 4 * len(Purpose) * 73


def test_a_trailing_zero_is_part_of_the_key():
    assert derive_seed(3, Purpose.ORDER) != derive_seed(3, Purpose.ORDER, 0)
    assert derive_seed(3, Purpose.ORDER, 5) != derive_seed(3, Purpose.ORDER, 5, 0)


def test_a_seed_depends_on_nothing_but_its_arguments():
    alone = derive_seed(0, Purpose.MODEL, 4, 2)
    state = np.random.get_state()  # noqa: NPY002 - the global state is what must not matter
    for other in range(20):
        derive_seed(0, Purpose.MODEL, 4, other)
    assert derive_seed(0, Purpose.MODEL, 4, 2) == alone
    after = np.random.get_state()  # noqa: NPY002
    assert after[2] == state[2]
    assert np.array_equal(after[1], state[1])


def test_seeds_are_python_integers_of_63_bits_that_use_the_whole_range():
    seeds = [derive_seed(0, Purpose.ORDER, i) for i in range(2000)]
    assert all(type(s) is int and 0 <= s < 2**63 for s in seeds)
    # each bit is set in half the draws: 1000 with deviation 22, so 5 deviations are 112
    for bit in range(63):
        assert abs(sum(s >> bit & 1 for s in seeds) - 1000) < 112


def test_seed_zero_is_a_seed_and_not_the_absence_of_one():
    assert derive_seed(0, Purpose.SPLIT) == derive_seed(0, Purpose.SPLIT)
    assert derive_seed(0, Purpose.SPLIT) != derive_seed(1, Purpose.SPLIT)


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="non-negative"):
        derive_seed(-1, Purpose.SPLIT)
