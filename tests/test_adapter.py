import numpy as np
import pytest
from raising import raising

from fedlora.core.adapter import Adapter, Layout, Update
from fedlora.core.errors import NonFiniteUpdate, UpdateRejected, WrongContext

TENSORS = {"q.lora_A.weight": np.ones((2, 3)), "q.lora_B.weight": np.arange(8.0).reshape(4, 2)}


def test_tensors_come_back_as_they_went_in():
    adapter = Adapter.of(TENSORS)
    assert {n: t.tolist() for n, t in adapter.tensors().items()} == {n: t.tolist() for n, t in TENSORS.items()}


def test_an_adapter_cannot_be_changed_under_its_reader():
    with pytest.raises(ValueError, match="read-only"):
        Adapter.of(TENSORS).vector[0] = 5


def test_a_layout_survives_its_own_bytes_and_no_others():
    layout = Adapter.of(TENSORS).layout
    assert Layout.parse(layout.dump()) == layout
    for bad in (
        b"[]",
        b"{}",
        b"[",
        layout.dump() + b" ",
        b'[["b",[1]],["a",[1]]]',
        b'[["a",[1]],["a",[1]]]',
        b'[["a",[0]]]',
        b'[["a",[true]]]',
        b'[["../x",[1]]]',
        b'[["a",[1.0]]]',
        b'[["a",[99999999,99999999]]]',
        b'[["a",["1"]]]',
    ):
        with raising(WrongContext, code="wrong-layout"):
            Layout.parse(bad)


def test_pairs_know_ranks_and_sizes():
    (pair,) = Adapter.of(TENSORS).layout.pairs()
    assert (pair.module, pair.rank, pair.d_in, pair.d_out) == ("q", 2, 3, 4)


@pytest.mark.parametrize(
    "broken",
    [
        {"q.lora_A.weight": (2, 3)},
        {"q.lora_B.weight": (4, 2)},
        {"x.weight": (3, 3)},
        {"q.lora_A.weight": (2, 3), "q.lora_B.weight": (4, 3)},
    ],
)
def test_a_tensor_outside_a_pair_is_refused(broken):
    with raising(WrongContext, code="wrong-layout"):
        Layout.of(broken).pairs()


def test_the_digest_tells_values_and_names_apart():
    one = Adapter.of(TENSORS)
    renamed = Adapter.of({n.replace("q", "v"): t for n, t in TENSORS.items()})
    nudged = Adapter(np.nextafter(one.vector, np.float32(9)), one.layout)
    assert len({one.digest(), renamed.digest(), nudged.digest()}) == 3


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 6])
def test_one_bad_value_is_found_wherever_it_is(poison, where):
    delta = np.full(7, 3e38, np.float32)
    Update(delta.copy(), 1, {}).check(7)
    delta[where] = poison
    with pytest.raises(NonFiniteUpdate):
        Update(delta, 1, {}).check(7)


def test_opposite_infinities_do_not_cancel():
    with pytest.raises(NonFiniteUpdate):
        Update(np.array([np.inf, -np.inf], np.float32), 1, {}).check(2)


@pytest.mark.parametrize("value", [-1, 1 << 53, 1.0, True, float("nan"), None])
def test_a_bad_counter_is_found(value):
    with pytest.raises(UpdateRejected, match="eval/nats"):
        Update(np.zeros(1, np.float32), 1, {"eval/nats": value, "eval/tokens": 1}).check(1)
