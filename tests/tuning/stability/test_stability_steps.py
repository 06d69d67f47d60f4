"""The closed form of the first step and the stacked steps, held to PEFT's own layers and torch's own optimizers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stability_toys import LinearToy, first_rows, fitted, grid
from test_stability_truths import make_subject

torch = pytest.importorskip("torch", reason="torch comes with the train extra")
peft = pytest.importorskip("peft", reason="peft comes with the train extra")

from rankwise.records import StabilityRow
from rankwise.tuning.models import load_model
from rankwise.tuning.stability import first_step, stepping
from rankwise.tuning.stability import subject as subjects
from rankwise.tuning.stability.first_step import FirstStep
from rankwise.tuning.stability.listening import Site, listen
from rankwise.tuning.stability.settings import LINEARITY, Cell
from rankwise.tuning.stability.starts import unit_draw
from rankwise.tuning.stability.stepping import run_cells
from rankwise.tuning.stability.subject import LanguageModel, frozen, language_model
from rankwise.tuning.targets import target_modules

STEPS = (1, 2, 3)
FIELDS = ("branch_rms", "relative_rms", "update_rms", "grad_norm_A", "grad_norm_B", "loss")


@pytest.fixture
def subject(pico: Path) -> Iterator[LanguageModel]:
    made = make_subject(pico)
    with frozen(made.model):
        yield made


def steps_of(subject: Any, cells: Any, steps: Any = STEPS, base: Any = None) -> list[StabilityRow]:
    sites, _ = listen(subject)
    return run_cells(subject, sites, cells, steps=steps, eps=1e-8, said=lambda _: None, base=base)[0]


def key(row: StabilityRow) -> tuple[Any, ...]:
    return row.rule, row.optimizer, row.init, row.rank, row.seed, row.step, row.module


def assert_same(one: Any, two: Any, rel: float, fields: tuple[str, ...] = FIELDS) -> None:
    left, right = ({key(row): row for row in rows} for rows in (one, two))
    assert left.keys() == right.keys()
    assert left
    for name, row in left.items():
        for field in fields:
            a, b = getattr(row, field), getattr(right[name], field)
            assert a == pytest.approx(b, rel=rel, abs=1e-12), (name, field)


# --- the closed form ----------------------------------------------------------------------------------------


def test_the_closed_form_is_the_first_real_step(subject: LanguageModel) -> None:
    """Every rule, optimizer, init, rank and seed. float32 sums in another order: 1e-4, and Adam's quotient of an entry
    near eps carries its rounding into the branch."""
    chosen = grid(scaling=("lora", "rslora", "unscaled"), init=("default", "gaussian"), seeds=(0, 7))
    sites, _ = listen(subject)
    closed = FirstStep(subject, sites, chosen.cells(), eps=chosen.eps).run()
    assert len(closed) == 2 * 2 * 3 * 3 * 2 * len(sites)
    assert_same(closed, steps_of(subject, chosen.cells(), (1,)), 1e-3)


def test_so_it_is_in_float64_to_the_last_digits(pico: Path) -> None:
    made = make_subject(pico, wide=True)
    chosen = grid(seeds=(0, 1))
    with frozen(made.model):
        sites, _ = listen(made)
        closed = FirstStep(made, sites, chosen.cells(), eps=chosen.eps).run()
        assert_same(closed, steps_of(made, chosen.cells(), (1,)), 1e-7)  # float64 rounding, amplified near eps


@pytest.mark.parametrize("optimizer", sorted(LINEARITY))
@pytest.mark.parametrize("rate", [1e-25, 1e25])
def test_at_the_first_step_the_rate_is_a_factor_however_small_or_large(optimizer: str, rate: float) -> None:
    """Squares of such a branch lie beyond float32."""
    toy = LinearToy("independent", width=32)
    plain, far = (first_rows(toy, grid(optimizer=(optimizer,), rates={optimizer: of})) for of in (1.0, rate))
    for rule in ("lora", "rslora"):
        wanted, got = (fitted(measured, rule, optimizer) for measured in (plain, far))
        assert got.mean == pytest.approx(wanted.mean, abs=1e-12)  # one float64 product is all that differs
        sizes = [m.logs((rule, optimizer, "default"), 1, "all", "rms").values for m in (plain, far)]
        np.testing.assert_allclose(sizes[1] - sizes[0], math.log(rate), rtol=1e-12)


def test_it_keeps_nothing_of_a_module(subject: LanguageModel) -> None:
    sites, _ = listen(subject)
    first = FirstStep(subject, sites, grid().cells(), eps=1e-8)
    first.run()
    assert first._pulls == {}
    assert first._spread == {}


def test_where_not_all_fits_some_modules_go_after_the_others(
    subject: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The most that is held is K of one module in place of fourteen."""
    sites, _ = listen(subject)
    chosen = grid(seeds=(0, 1))
    whole = FirstStep(subject, sites, chosen.cells(), eps=1e-8)
    wanted = whole.run()
    held: list[int] = []
    settle = FirstStep._settle

    def settled(self: FirstStep, name: str) -> None:
        held.append(len({module for module, _ in self._spread}))
        settle(self, name)

    monkeypatch.setattr(FirstStep, "_settle", settled)
    monkeypatch.setattr(first_step, "MOST_SPREAD", 3 * 4 * 2 * max(chosen.ranks) ** 2)
    got = FirstStep(subject, sites, chosen.cells(), eps=1e-8).run()
    assert held == [3, 2, 1] * 4 + [2, 1]
    assert sorted(map(key, got)) == sorted(map(key, wanted))
    assert_same(got, wanted, 1e-6)  # the same products


def test_one_backward_pass_serves_all_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = LinearToy("independent")
    sites, _ = listen(toy)
    FirstStep(toy, sites, grid(seeds=tuple(range(9))).cells(), eps=1e-8).run()
    assert toy.copies_seen == [1]


class Twice(LinearToy):
    """A layer that one pass calls twice, as tied layers are."""

    def losses(self, step: int, copies: int) -> Any:
        y = self.layer(self.x.repeat(copies, 1)) + 0.5 * self.layer(self.x.repeat(copies, 1).flip(1))
        return -(y.view(copies, *self.x.shape) * self.target).sum(dim=2).mean(dim=1)

    def probe(self) -> None:
        with torch.no_grad():
            self.layer(self.held_out)
            self.layer(self.held_out.flip(1))


def test_a_layer_called_twice_gets_the_sum_of_its_gradients() -> None:
    toy = Twice("independent", width=64)
    chosen = grid(ranks=(4, 16))
    sites, _ = listen(toy)
    assert sites[0].calls == 2
    closed = FirstStep(toy, sites, chosen.cells(), eps=1e-8).run()
    assert_same(closed, steps_of(toy, chosen.cells(), (1,)), 1e-3)


# --- the stacks ---------------------------------------------------------------------------------------------


def with_peft(folder: Path, subject: LanguageModel, cell: Cell, sites: tuple[Site, ...]) -> dict[Any, dict[str, float]]:
    """Take the same steps as a user would: PEFT's model, transformers' loss, torch's optimizer; measure by hand."""
    plain = load_model(str(folder), device="cpu").model.eval()
    inputs: dict[str, Any] = {}
    outputs: dict[str, Any] = {}
    handles = []
    for site in sites:

        def hear(_: Any, args: Any, output: Any, name: str = site.name) -> None:
            rows = subject.measuring.mask.bool()
            inputs[name], outputs[name] = args[0][rows].detach(), output[rows].detach()

        handles.append(plain.get_submodule(site.name).register_forward_hook(hear))
    plain(input_ids=subject.measuring.ids, attention_mask=subject.measuring.mask)
    for handle in handles:
        handle.remove()
    alpha = cell.scale * cell.rank
    config = peft.LoraConfig(
        r=cell.rank, lora_alpha=alpha, target_modules=[site.name for site in sites], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(plain, config).eval()
    layers = {site.name: model.base_model.model.get_submodule(site.name) for site in sites}
    with torch.no_grad():
        for site in sites:
            start = unit_draw(cell.init, cell.rank, site.in_features, seed=cell.seed, place=site.place)
            layers[site.name].lora_A["default"].weight.copy_(torch.from_numpy(start) * cell.start)
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[cell.optimizer]
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=cell.rate_b, weight_decay=0.0)

    def branches() -> dict[str, Any]:
        with torch.no_grad():
            return {
                name: layer.scaling["default"] * layer.lora_B["default"](layer.lora_A["default"](inputs[name]))
                for name, layer in layers.items()
            }

    found: dict[Any, dict[str, float]] = {}
    before = branches()
    for step in STEPS:
        batch = subject.batches[(step - 1) % len(subject.batches)]
        labels = torch.full_like(batch.ids, -100)
        labels[:, 1:][batch.predicts[:, :-1]] = batch.targets
        optimizer.zero_grad()
        loss = model(input_ids=batch.ids, attention_mask=batch.mask, labels=labels).loss
        loss.backward()
        norms = {
            name: tuple(float(of["default"].weight.grad.norm()) for of in (layer.lora_A, layer.lora_B))
            for name, layer in layers.items()
        }
        optimizer.step()
        after = branches()
        for name in layers:
            rms = float(after[name].square().mean().sqrt())
            found[cell.rule, cell.optimizer, cell.init, cell.rank, cell.seed, step, name] = {
                "branch_rms": rms,
                "relative_rms": rms / float(outputs[name].square().mean().sqrt()),
                "update_rms": float((after[name] - before[name]).square().mean().sqrt()),
                "grad_norm_A": norms[name][0],
                "grad_norm_B": norms[name][1],
                "loss": float(loss.detach()),
            }
        before = after
    return found


def test_stacked_steps_are_those_of_peft_and_torch(pico: Path, subject: LanguageModel) -> None:
    """Cells of one stack each against a run of their own. float32: Adam's quotient amplifies the rounding of entries
    near zero, whose size is in the branch; measured 2e-4 at most."""
    chosen = grid(ranks=(4, 16), init=("default", "gaussian"), seeds=(0, 3))
    sites, _ = listen(subject)
    rows = {key(row): row for row in steps_of(subject, chosen.cells())}
    tried = [c for c in chosen.cells() if (c.rank, c.seed) in {(4, 0), (16, 3)}]
    assert len(tried) == 16
    for cell in tried:
        for name, wanted in with_peft(pico, subject, cell, sites).items():
            for field, value in wanted.items():
                # an A without a gradient at step 1 is zero to rounding on both sides
                assert getattr(rows[name], field) == pytest.approx(value, rel=5e-3, abs=1e-9), (name, field)


def test_multiplied_out_or_in_factors_the_steps_are_the_same(pico: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 16 on layers 16 to 64 wide, with some 80 rows: B A multiplied out is cheaper in some, and no other step."""
    from rankwise.tuning.stability import stepping

    made = make_subject(pico, wide=True)
    cells = grid(ranks=(16, 32), seeds=(0,)).cells()
    with frozen(made.model):
        found = []
        for whole in (True, False):
            monkeypatch.setattr(stepping, "_cheaper_whole", lambda *_, answer=whole: answer)
            found.append(steps_of(made, cells))
    assert_same(*found, 1e-6)  # float64 in another order, amplified by Adam near zero


class OneByOne:
    """A subject that lets no two cells share a pass."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def most_copies(self) -> int:
        return 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def test_a_cell_does_not_notice_the_others_in_its_stack(pico: Path) -> None:
    made = make_subject(pico, wide=True)
    cells = grid(ranks=(4, 16)).cells()
    with frozen(made.model):
        assert_same(steps_of(made, cells), steps_of(OneByOne(made), cells), 1e-6)  # float64, sums in another order


def test_a_cell_that_leaves_does_not_take_the_others_along(subject: LanguageModel) -> None:
    from dataclasses import replace

    sites, _ = listen(subject)
    good = grid().cell(("lora", "sgd", "default"), 4, 0)
    bad = replace(good, rule="unscaled", scale=1e30)
    rows, diverged = run_cells(subject, sites, [good, bad], steps=(1, 3), eps=1e-8, said=lambda _: None)
    assert set(diverged) == {bad}
    mine = [row for row in rows if row.rule == "lora"]
    assert_same(mine, steps_of(subject, [good], (1, 3)), 1e-4)
    assert all(row.branch_rms is None or math.isfinite(row.branch_rms) for row in rows)


def test_too_many_copies_for_the_memory_are_halved(subject: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = grid(scaling=("lora",), optimizer=("sgd",), ranks=(4, 16), seeds=(0, 1, 2, 3)).cells()
    wanted = steps_of(subject, cells)
    copies: list[int] = []
    losses = LanguageModel.losses

    def tight(self: Any, step: int, number: int) -> Any:
        copies.append(number)
        if number > 1:
            raise torch.OutOfMemoryError("no room")
        return losses(self, step, number)

    monkeypatch.setattr(LanguageModel, "losses", tight)
    assert_same(steps_of(subject, cells, base=[9.0] * 3), wanted, 1e-4)
    assert copies[:3] == [4, 2, 1]


def test_one_cell_that_does_not_fit_is_an_error_in_words(
    subject: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rankwise.errors import DeviceError

    def never(self: Any, step: int, number: int) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(LanguageModel, "losses", never)
    with pytest.raises(DeviceError, match=r"one run of rank 4 does not fit .* --batch-size"):
        steps_of(subject, grid().cells(), base=[9.0] * 3)


# --- batches, and what is lent ------------------------------------------------------------------------------


def test_few_logits_give_the_loss_of_transformers(subject: LanguageModel) -> None:
    """The head sees only positions with a label, and the loss is that of all of them."""
    for step in (1, 2):
        batch = subject.batches[step - 1]
        labels = torch.full_like(batch.ids, -100)
        labels[:, 1:][batch.predicts[:, :-1]] = batch.targets
        with torch.no_grad():
            whole = subject.model(input_ids=batch.ids, attention_mask=batch.mask, labels=labels).loss
            mine = subject.losses(step, 3)
        assert mine.tolist() == pytest.approx([float(whole)] * 3, rel=1e-5)


def test_a_model_whose_head_cannot_be_found_gives_the_same(subject: LanguageModel) -> None:
    from dataclasses import replace

    with torch.no_grad():
        one, two = subject.losses(1, 2), replace(subject, _head=None).losses(1, 2)
    assert torch.allclose(one, two, rtol=1e-5)


def test_what_is_measured_on_is_not_trained_on(pico: Path) -> None:
    made = make_subject(pico, steps=2)
    measuring = {tuple(ids) for ids in made.measuring.ids.tolist()}
    trained = {tuple(ids[: made.measuring.ids.shape[1]]) for batch in made.batches for ids in batch.ids.tolist()}
    assert len(measuring) == 8
    assert not measuring & trained


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_few_rows_are_enough(pico: Path, rows: int) -> None:
    made = make_subject(pico, steps=5, rows=rows)
    assert len(made.batches) == 1
    with torch.no_grad():
        assert torch.isfinite(made.losses(5, 2)).all()


def flags(model: Any) -> Any:
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [p.grad is None for p in model.parameters()],
        [bool(getattr(m, "gradient_checkpointing", False)) for m in model.modules()],
        model.config.use_cache,
        hooks,
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_lent_model_comes_back_as_it_was(pico: Path, checkpointing: bool) -> None:
    model = load_model(str(pico), device="cpu").model
    model.train()
    model.lm_head.requires_grad_(False)
    before = flags(model)

    def interrupted() -> None:
        with frozen(model, gradient_checkpointing=checkpointing):
            assert not any(p.requires_grad for p in model.parameters())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert flags(model) == before


def test_gradient_checkpointing_recomputes_and_changes_no_figure(pico: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_subject(pico)
    cells = grid(ranks=(4, 16), seeds=(0,)).cells()
    calls = 0
    original = made.model.model.layers[0].mlp.down_proj.forward

    def counting(x: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(x)

    monkeypatch.setattr(made.model.model.layers[0].mlp.down_proj, "forward", counting)
    found, counts = [], []
    for checkpointing in (False, True):
        calls = 0
        with frozen(made.model, gradient_checkpointing=checkpointing):
            sites, _ = listen(made)
            closed = FirstStep(made, sites, cells, eps=1e-8).run()
            found.append((closed, steps_of(made, cells)))
            counts.append(calls)
    assert counts[1] > counts[0], "layers were computed twice"
    for plain, again in zip(*found, strict=True):
        assert_same(plain, again, 1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_stays_off(checkpointing: bool) -> None:
    """OPT has dropout in its layers' own forward pass, and drops whole layers in training."""
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 2}
    config = OPTConfig(
        vocab_size=64, num_attention_heads=2, max_position_embeddings=32, dropout=0.5, layerdrop=0.5, **sizes
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OPTForCausalLM(config)
    ids = [[(7 * i + 3 * k) % 60 for k in range(6 + i % 3)] for i in range(12)]
    made = language_model(model, target_modules(model), {"input_ids": ids, "labels": ids}, steps=3, size=4)
    cells = grid(ranks=(2, 4), seeds=(0,)).cells()
    with frozen(model, gradient_checkpointing=checkpointing):
        sites, _ = listen(made)
        assert len(sites) == 12
        closed = FirstStep(made, sites, cells, eps=1e-8).run()
        assert_same(closed, steps_of(made, cells, (1,)), 1e-3)
        assert_same(steps_of(made, cells), steps_of(made, cells), 1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_half_precision_bases_have_branches_in_float32(pico: Path, dtype: str) -> None:
    made = make_subject(pico)
    made.model.to(getattr(torch, dtype))
    cells = grid(ranks=(4, 16), seeds=(0,)).cells()
    with frozen(made.model):
        sites, _ = listen(made)
        closed = FirstStep(made, sites, cells, eps=1e-8).run()
        # bfloat16 has 8 bits: activations of a stack of two differ from those of one in their last
        assert_same(closed, steps_of(made, cells, (1,)), 0.05)


def test_layers_of_gpt2_are_turned(tmp_path: Path) -> None:
    """Conv1D keeps its weight as (in, out); the branch hangs on inputs and outputs, and does not care."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    ids = [[(7 * i + 3 * k) % 60 for k in range(6 + i % 3)] for i in range(12)]
    made = language_model(model, target_modules(model), {"input_ids": ids, "labels": ids}, steps=3, size=4)
    cells = grid(ranks=(2, 4), seeds=(0,)).cells()
    with frozen(model):
        sites, skipped = listen(made)
        assert (len(sites), skipped) == (8, ())
        assert {(s.name.rsplit(".", 1)[-1], s.out_features, s.in_features) for s in sites} == {
            ("c_attn", 48, 16), ("c_proj", 16, 16), ("c_fc", 64, 16), ("c_proj", 16, 64),
        }  # fmt: skip
        closed = FirstStep(made, sites, cells, eps=1e-8).run()
        assert_same(closed, steps_of(made, cells, (1,)), 1e-3)


def test_the_stack_is_as_large_as_the_memory_allows(subject: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = max(batch.ids.numel() for batch in subject.batches)
    monkeypatch.setattr(subjects, "MOST_TOKENS", 3 * tokens + 1)
    assert subject.most_copies() == 3
    monkeypatch.setattr(subjects, "MOST_TOKENS", 1)
    assert subject.most_copies() == 1


def test_the_factors_of_a_stack_fit_into_the_memory_too(
    subject: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many cells of a high rank: weights, gradients, moments and a copy of each."""
    sites, _ = listen(subject)
    cells = grid(scaling=("lora",), optimizer=("sgd",), ranks=(4, 16), seeds=(0, 1, 2, 3)).cells()
    sides = sum(site.in_features + site.out_features for site in sites)
    copies: list[int] = []
    losses = LanguageModel.losses

    def count(self: Any, step: int, number: int) -> Any:
        copies.append(number)
        return losses(self, step, number)

    monkeypatch.setattr(LanguageModel, "losses", count)
    monkeypatch.setattr(stepping, "MOST_FACTORS", 2 * 5 * 4 * 16 * sides)
    wanted = steps_of(subject, cells, (1,), base=[9.0])
    assert copies == [4, 2, 2]
    monkeypatch.setattr(stepping, "MOST_FACTORS", 1)
    assert_same(steps_of(subject, cells, (1,), base=[9.0]), wanted, 1e-4)
    assert copies[3:] == [1] * 8


def test_draws_of_a_are_nested_and_of_pefts_size() -> None:
    for init, bound in (("default", 1 / 32), ("gaussian", None)):
        small, large = (unit_draw(init, rank, 1024, seed=3, place=2) for rank in (4, 64))
        assert (large[:4] == small).all()
        other = unit_draw(init, 4, 1024, seed=3, place=1)
        assert not (other == small).any()
        if bound is not None:
            assert abs(large).max() <= bound
            # 65,536 draws of a uniform: its standard deviation to 1 %
            assert large.std() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    bare = torch.nn.Sequential(torch.nn.Linear(1024, 8))
    layer = peft.get_peft_model(bare, peft.LoraConfig(r=64, target_modules=["0"])).base_model.model[0]
    ours = unit_draw("default", 64, 1024, seed=0, place=0)
    theirs = layer.lora_A["default"].weight.detach().numpy()
    assert float(theirs.std()) == pytest.approx(float(ours.std()), rel=0.02)
    assert abs(theirs).max() <= 1 / 32 * (1 + 1e-6)
