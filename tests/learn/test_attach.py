"""A script with a transformers Trainer joins: real Trainers, whose rows and settings go through the code of every other row."""

import dataclasses
import json
from collections import Counter

import pytest
from doctor_site import Place
from test_doctor import plan as pinned_plan
from transformers import TrainingArguments

from fedlora.cli import main
from fedlora.core.errors import ConfigError, DataError, StoreError
from fedlora.formats.plans import load_plan
from fedlora.rules.first import first_adapter

pytestmark = [pytest.mark.torch, pytest.mark.slow]

RAW = [
    {"prompt": f"{n} {thing}s:", "completion": f" {color}", "patient": f"{thing}-{n // 2}", "name": "Mrs. Miller"}
    for n in range(2, 14)
    for thing, color in (("apple", "red"), ("stone", "blue"), ("river", "green"))
]


def tokens(row, tokenizer, *, prompts=False, end=True):
    """What such scripts do: one text, the prompt without a loss."""
    ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id] * end
    asked = 0 if prompts else len(tokenizer(row["prompt"])["input_ids"])
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * asked + ids[asked:]}


def trainer(toy, path, *, dataset=None, lora=None, **arguments):
    """A real Trainer on the toy base, with a LoRA adapter of PEFT's."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(toy)
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | (lora or {})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(toy, dtype="float32"), LoraConfig(**lora))
    settings = {"per_device_train_batch_size": 4, "learning_rate": 5e-3, "num_train_epochs": 4, "lr_scheduler_type": "cosine"}
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(path / "out"), report_to=[], use_cpu=True, **(settings | arguments)),
        train_dataset=[tokens(row, tokenizer) for row in RAW] if dataset is None else dataset,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )


@dataclasses.dataclass
class WithLoss(TrainingArguments):
    """As TRL has it, which is not installed here."""

    completion_only_loss: bool | None = None


def attach(*args, **kwargs):
    import fedlora

    return fedlora.attach(*args, **kwargs)


def test_three_lines_simulate_what_a_trainer_trains(toy, tmp_path):
    import fedlora

    mine = trainer(toy, tmp_path, warmup_steps=0.1, num_train_epochs=10)
    joined = attach(mine, study=tmp_path / "study", rows=RAW, data={"group_key": "patient"})
    (results,) = fedlora.simulate(joined.plan, out=tmp_path / "study" / "run", root=tmp_path / "study")
    assert (joined.compared, joined.same) == (len(RAW), len(RAW))
    assert joined.plan == load_plan(tmp_path / "study" / "plan.toml")  # the command line runs the same
    plan = joined.plan
    assert (plan.lora.r, plan.lora.lora_alpha, plan.lora.target_modules) == (4, 8, ("q_proj", "v_proj"))
    assert (plan.training.learning_rate, plan.training.per_device_train_batch_size) == (5e-3, 4)
    assert (plan.model.dtype, plan.model.quantization, plan.training.warmup_ratio) == ("float32", "none", pytest.approx(0.1))
    assert plan.federation.num_rounds * plan.federation.local_steps * 3 == 10 * len(RAW) / 4
    base, federated = (results.arms[name].sites for name in ("base", "federated"))
    assert all(federated[site].nll < base[site].nll for site in results.sites)


def test_only_what_is_read_is_written_and_for_this_user_alone(toy, tmp_path):
    joined = attach(trainer(toy, tmp_path), study=tmp_path / "study", rows=RAW, data={"group_key": "patient"})
    assert Counter(map(len, map(json.loads, joined.rows.read_text().splitlines()))) == {3: len(RAW)}
    assert "Miller" not in joined.rows.read_text()
    assert joined.rows.stat().st_mode & 0o777 == 0o600
    assert not [line for line in joined.said if "apple" in line or "red" in line.split()]


@pytest.mark.parametrize(
    ("made", "same", "said"),
    [
        ({"prompts": True}, 0, "36 its ids alone (other tokens are trained on); the first that differs is row 1"),
        ({"end": False}, 0, "0 its ids alone"),
    ],
)
def test_a_trainer_that_trains_on_other_tokens_is_told(toy, tmp_path, made, same, said):
    other = trainer(toy, tmp_path)
    other.train_dataset = [tokens(row, other.processing_class, **made) for row in RAW]
    joined = attach(other, study=tmp_path / "study", rows=RAW)
    assert joined.same == same
    assert said in str(joined)
    other.train_dataset = other.train_dataset[:-1]
    assert "not compared" in str(attach(other, study=tmp_path / "fewer", rows=RAW))


def test_what_a_plan_cannot_say_is_said_and_not_dropped(toy, tmp_path):
    other = trainer(toy, tmp_path, label_smoothing_factor=0.1, optim="sgd", lora={"use_dora": True})
    joined = attach(other, study=tmp_path / "study", rows=RAW)
    assert "for it: optim = sgd, label_smoothing_factor = 0.1, use_dora = True\n" in str(joined)
    with pytest.raises(ConfigError, match="learning_rate"):
        attach(trainer(toy, tmp_path, learning_rate=2.0), study=tmp_path / "wrong", rows=RAW)


OTHER = {
    "lr_scheduler_kwargs": {"num_cycles": 2}, "bf16": True, "fp16": True, "adam_beta1": 0.0, "optim_args": "a=1",
    "dataloader_drop_last": True, "neftune_noise_alpha": 5.0, "load_best_model_at_end": True, "completion_only_loss": False,
}  # fmt: skip
OTHER_LORA = {
    "init_lora_weights": "gaussian", "exclude_modules": ["v_proj"], "lora_alpha": 8.5, "bias": "all", "lora_bias": True,
    "rank_pattern": {"q_proj": 2}, "modules_to_save": ["lm_head"], "target_parameters": ["x"], "layer_replication": [[0, 1]],
}  # fmt: skip


def test_every_setting_that_is_not_at_its_default_is_in_the_plan_or_said(toy, tmp_path):
    from fedlora.learn.scripts.settings import not_taken

    mine = trainer(toy, tmp_path, lora={"task_type": "CAUSAL_LM", "lora_dropout": 0.1}, weight_decay=0.1, seed=3, logging_steps=1)
    mine.args = WithLoss(**{f.name: getattr(mine.args, f.name) for f in dataclasses.fields(mine.args) if f.init})
    assert not_taken(mine) == []
    mine.args.completion_only_loss = True
    assert not_taken(mine) == []  # as a plan does
    config = mine.model.peft_config["default"]
    for settings, name, value in [(mine.args, *o) for o in OTHER.items()] + [(config, *o) for o in OTHER_LORA.items()]:
        before = getattr(settings, name)
        setattr(settings, name, value)
        assert f"{name} = {value}" in "".join(not_taken(mine))
        setattr(settings, name, before)


def test_what_a_later_version_of_a_library_adds_is_said_too(toy, tmp_path):
    from fedlora.learn.scripts.settings import _others

    later = dataclasses.make_dataclass("Later", [("new_loss", str, "nll"), ("save_more", bool, False)])
    assert _others(later()) == []
    assert _others(later("dft", save_more=True)) == ["new_loss = dft"]


def test_mistakes_are_said_with_the_way_out(toy, tmp_path):
    mine = trainer(toy, tmp_path)
    with pytest.raises(DataError, match="but token ids") as error:
        attach(mine, study=tmp_path / "study")
    assert "rows=raw" in error.value.hint
    attach(mine, study=tmp_path / "study", rows=RAW)
    assert attach(mine, study=tmp_path / "study", rows=RAW).same == len(RAW)  # the script runs again
    with pytest.raises(StoreError, match="other rows"):
        attach(mine, study=tmp_path / "study", rows=RAW[1:])
    with pytest.raises(ValueError, match="study=DIRECTORY"):
        attach(mine, rows=RAW)
    with pytest.raises(ConfigError, match="group_keys"):
        attach(mine, study=tmp_path / "typo", rows=RAW, data={"group_keys": "patient"})


def test_a_site_trains_on_a_trainers_rows_under_its_own_site_file(toy, tmp_path, capsys):
    place, mine = Place(tmp_path / "x", base=toy), trainer(toy, tmp_path)
    with pytest.raises(StoreError, match="other rows"):  # a run may have begun on them
        attach(mine, site=place.file, rows=RAW)
    (place.root / "rows.jsonl").unlink()
    before = place.file.read_text()
    joined = attach(mine, site=place.file, rows=RAW)
    assert (joined.plan, joined.same, joined.rows) == (None, len(RAW), place.root / "rows.jsonl")
    assert place.file.read_text() == before  # policy and approvals are a person's
    assert main(["site", "dry-run", str(place.file), "--json"]) != 0  # nobody has approved a plan
    from fedlora.learn.base import load_base, machine_for
    from fedlora.learn.lora import layout_of

    asked = pinned_plan(lora={"r": 2, "target_modules": ("q_proj",)}, training={"max_length": 64}, model={},
                        federation={"min_sites": 3, "local_steps": 1})  # fmt: skip
    base = load_base(asked.model, toy, machine_for(asked, device="cpu"))
    init = first_adapter(layout_of(base, asked.lora), seed=asked.run.seed).digest()
    place.approve(asked.pinned(base=base.digest, init=init))
    capsys.readouterr()
    assert main(["site", "dry-run", str(place.file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["data"]
    assert (found["rows"], found["found"]) == (len(RAW), [])  # answers of fewer than eight bytes are not looked for
    place.change(data={"path": "data/*.jsonl"})
    with pytest.raises(ConfigError, match="as one JSONL file"):
        attach(mine, site=place.file, rows=RAW)


def other_value(value):
    """One that is not this, of its kind."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else [*value, "x"] if isinstance(value, list) else "other"


def test_every_argument_that_a_script_has_set_is_in_the_plan_or_named(toy, tmp_path):
    """One after the other, all that this version of transformers has; what they make of others is not asked here."""
    from fedlora.learn.scripts.settings import _TAKEN, not_called, not_taken

    mine = trainer(toy, tmp_path)
    before = "\n".join([*not_taken(mine), *not_called(mine)])
    names = [
        f.name for f in dataclasses.fields(mine.args) if not f.name.startswith("_") and f.name not in _TAKEN | {"output_dir"}
    ]
    assert len(names) > 60
    for name in names:
        value = getattr(mine.args, name)
        object.__setattr__(mine.args, name, "cosine_with_restarts" if name == "lr_scheduler_type" else other_value(value))
        if name == "use_cpu":
            assert "use_cpu" in before
        elif name != "dataloader_pin_memory":  # which follows from use_cpu
            assert name in "\n".join([*not_taken(mine), *not_called(mine)]), name
        object.__setattr__(mine.args, name, value)
    assert "\n".join([*not_taken(mine), *not_called(mine)]) == before


@pytest.mark.parametrize("at", ["study", "site"])
def test_code_of_her_own_that_a_federation_never_runs_is_named_in_one_sentence(toy, tmp_path, at):
    from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

    class Mine(Trainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    class Watch(TrainerCallback):
        pass

    mine = trainer(toy, tmp_path)
    assert "not run" not in str(attach(mine, study=tmp_path / "before", rows=RAW))
    mine.__class__ = Mine
    mine.add_callback(Watch)
    mine.add_callback(EarlyStoppingCallback(2))
    mine.compute_loss_func = mine.compute_metrics = mine.preprocess_logits_for_metrics = mine.model_init = lambda *_: None
    mine.create_optimizer()
    if at == "site":
        place = Place(tmp_path / "x", base=toy)
        (place.root / "rows.jsonl").unlink()
    joined = attach(mine, rows=RAW, **({"site": place.file} if at == "site" else {"study": tmp_path / "study"}))
    (said,) = [line for line in joined.said if line.startswith("not run, as a federation trains in FedLoRA's own loop: ")]
    assert said.partition(": ")[2].split(", ") == [
        "compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics", "model_init",
        "callback Watch", "callback EarlyStoppingCallback", "optimizer", "Mine.compute_loss",
    ]  # fmt: skip
