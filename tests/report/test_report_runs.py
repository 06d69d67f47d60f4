"""The pages of runs, measured adapters and demos: every number from the record, nothing unfinished drawn as done."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import run_samples as samples
from test_report_page import Reader

from rankwise.records import from_json, to_json
from rankwise.report import render_page, words
from rankwise.report.demo_contents import demo_verdict, run_tables
from rankwise.report.drawing import Figure, evenly
from rankwise.report.figures import (
    exact_recall,
    health,
    loss_curve,
    recall_attributes,
    recall_forgetting,
    recall_splits,
    recalled_bits,
    trained_energy,
)
from rankwise.report.looks import BROKEN, facts_runs, hue, label_places, symbols
from rankwise.report.page import figures_of
from rankwise.report.run_contents import config_rows, recall_facts, recall_verdict, run_verdict

replace = samples.replace


def must(figure: Figure | None) -> Figure:
    assert figure is not None
    return figure


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)))


@pytest.mark.parametrize("name", samples.RECORDS)
def test_a_record_read_back_gives_the_same_page(name: str) -> None:
    record = samples.RECORDS[name]
    assert render_page(from_json(to_json(record), type(record))) == render_page(record)


@pytest.mark.parametrize("name", [n for n in samples.RECORDS if n.startswith("hostile")])
def test_hostile_words_stay_words(name: str) -> None:
    html = render_page(samples.RECORDS[name])
    reader = Reader(html)
    assert reader.open == []
    assert not reader.of("img")
    assert not any(key.startswith("on") for _, attrs in reader.elements for key in attrs)
    assert "<script>window.hacked" not in html
    assert html.count("{{7*7}}") >= html.count("window.hacked=1"), "a name is no template"
    for figure in figures_of(samples.RECORDS[name]):
        assert "<script" not in json.dumps(figure.spec()).replace("\\u003c", "<"), "plotly.js reads a subset of HTML"


@pytest.mark.parametrize("name", samples.RECORDS)
def test_every_figure_has_a_table_with_and_without_scripts(name: str) -> None:
    figures = figures_of(samples.RECORDS[name])
    html = render_page(samples.RECORDS[name])
    hidden = re.findall(r"<noscript>(.*?)</noscript>", html, flags=re.DOTALL)
    assert sum("<table" in part for part in hidden) == len(figures)
    assert html.count('<details class="numbers">') == len(figures)
    for figure in figures:
        assert figure.fallback is not None
        assert figure.fallback.rows
        assert {len(row) for row in figure.fallback.rows} == {len(figure.fallback.head)}
        assert "n = " in " ".join(figure.caption)


def test_numbers_of_one_page_are_those_of_its_record() -> None:
    html = text_of(render_page(samples.run()))
    for there in (
        "39,144",
        "of 46,600",
        "84 %",
        "71.4 %",
        "0.132",
        "1.412",
        "1.544",
        "600,000",
        "480,000",
        "3 min 34 s",
    ):
        assert there in html
    assert "attention/early 4 64 16 2 100,000" in html


def test_a_demo_puts_its_caveats_before_every_figure_and_key_number() -> None:
    record = samples.demo()
    html = render_page(record)
    first = html.index("What is in the data")
    for caveat in record.caveats:
        assert html.index(caveat) < first
    order = [html.index(f'<h2 id="{f.name}">') for f in figures_of(record)]
    assert order == sorted(order)
    assert first < order[0]
    for sentence in record.reading:
        assert html.index(sentence) > order[-1]
    assert '<pre class="again">rankwise demo -o &#39;story and all&#39;</pre>' in html
    assert "by the bits recalled of 1,000 other people" in html


def test_demo_verdict_is_made_of_the_figures() -> None:
    assert demo_verdict(samples.demo()) == (
        "Of 46.6 bits a person, at the learning rate 0.003 that all share: alpha / r recalls 9.0 at rank 8 and 12.0 at "
        "rank 64; alpha / √r recalls 17.0 at rank 8 and 39.0 at rank 64. At a rate of its own, 0.01, alpha / r "
        "recalls 35.0 at rank 64."
    )
    broken = demo_verdict(samples.diverged_demo())
    assert "alpha / √r: -4.1 at rank 8 (diverged), unknown at rank 64 (diverged); alpha: unknown at rank 16." in broken
    assert demo_verdict(samples.empty_demo()) == "This demo holds no run on the facts."


def test_what_is_not_in_a_demo_has_no_heading() -> None:
    html = render_page(samples.empty_demo())
    for heading in ("caveats", "best", "again"):
        assert f'<h2 id="{heading}">' not in html
    called = render_page(samples.demo(command=("rankwise.demo(out='a b', seed=0)",)))
    assert text_of(called).count("rankwise.demo(out=&#39;a b&#39;, seed=0)") == 2, "a call is not quoted as argv"


def points(figure: Figure) -> list[tuple[Any, Any, str, str]]:
    """Return (rank, bits, symbol, colour) of every mark of the first figure."""
    found = []
    for trace in figure.data:
        if "markers" in trace["mode"]:
            symbol = trace["marker"]["symbol"]
            for x, y, mark in zip(trace["x"], trace["y"], symbol, strict=True):
                found.append((x, y, mark, trace["marker"]["color"]))
    return found


def test_first_figure_holds_every_run_on_the_facts_and_no_style() -> None:
    record = samples.demo()
    figure = must(recalled_bits.draw(record))
    shapes = symbols(run.rank for run in record.runs)
    wanted = {(r.rank, r.bits_per_person, shapes[r.rank], hue(r.scaling)) for r in record.runs if r.role != "style"}
    assert set(points(figure)) == wanted
    lines = {t["name"]: t for t in figure.data if "lines" in t["mode"] and t.get("showlegend") is not False}
    assert lines["alpha / r"]["y"] == [9, 12]
    assert lines["alpha / √r"]["y"] == [17, 39]
    assert [shape["y0"] for shape in figure.layout["shapes"]] == [pytest.approx(46.6), 0]
    assert figure.marks == ()
    assert "There is no run at a rate of its own for alpha / √r." in figure.caption
    bridge = next(t for t in figure.data if t["mode"] == "lines")
    assert (bridge["x"], bridge["y"]) == ([64, 64], [12, 35])


def test_a_run_that_diverged_is_a_cross_joined_to_nothing_or_is_named_as_missing() -> None:
    record = samples.diverged_demo()
    figure = must(recalled_bits.draw(record))
    assert (8, -4.1, BROKEN, hue("rslora")) in points(figure)
    for trace in figure.data:
        assert len(trace["x"]) == 1 or BROKEN not in trace["marker"]["symbol"], "no line leads to a cross"
        assert None not in trace["y"]
    assert figure.layout["yaxis"]["range"][0] < -4.1
    crossed, lost = figure.marks
    assert crossed == "Did not finish, drawn as a cross: rank 8, alpha / √r at 0.003 (diverged)."
    assert "rank 64, alpha / √r at 0.003 (diverged); rank 16, alpha at 0.003" in lost
    html = render_page(record)
    assert html.count(crossed) == 4, "every figure says so"
    assert html.count("× diverged") >= 2


@pytest.mark.parametrize("draw", [exact_recall.draw, recall_forgetting.draw, trained_energy.draw])
def test_other_figures_of_a_demo_cross_out_the_same_runs(draw: Any) -> None:
    figure = must(draw(samples.diverged_demo()))
    crosses = [t for t in figure.data if t.get("marker", {}).get("symbol") == BROKEN]
    assert crosses
    assert all(t["mode"].startswith("markers") for t in crosses)
    assert figure.marks


def test_unknown_shares_are_said_in_their_row() -> None:
    figure = must(exact_recall.draw(samples.diverged_demo()))
    said = {a["y"]: a["text"] for a in figure.layout["annotations"]}
    names = figure.layout["yaxis"]["ticktext"]
    assert {names[place].split("<br>")[0]: text for place, text in said.items()} == {
        "rank 64, alpha / √r": "diverged, unknown",
        "rank 16, alpha": "unknown",
    }


def test_style_and_facts_have_tables_of_their_own() -> None:
    record = samples.demo()
    facts, style = run_tables(record)
    assert [row[0] for row in facts.rows] == [run.name for run in facts_runs(record.runs)]
    assert [row[0] for row in style.rows] == ["style, rank 8, lora"]
    assert "bits a person" in facts.head
    assert "bits an example" in style.head
    cells = dict(zip(facts.head, facts.rows[3], strict=True))
    run = record.runs[3]
    assert cells["bits a person"] == "39.0"
    assert cells["factor"] == "2"
    assert cells["forgetting"] == words.number(run.forgetting)
    assert cells["record"] == run.path
    lost = dict(zip(facts.head, run_tables(samples.diverged_demo())[0].rows[3], strict=True))
    assert (lost["status"], lost["bits a person"], lost["time"]) == ("× diverged", words.UNKNOWN, words.UNKNOWN)


def test_energy_lines_are_the_shares_of_the_record() -> None:
    record = samples.demo()
    figure = must(trained_energy.draw(record))
    assert [t["name"] for t in figure.data][-1] == "style: rank 8, alpha / r"
    for run, trace in zip([*facts_runs(record.runs), record.runs[5]], figure.data, strict=True):
        shares = {int(k): v for k, v in run.energy_by_rank.items()}
        assert dict(zip(trace["x"], trace["y"], strict=True)) == pytest.approx(shares, rel=1e-5)


def test_forgetting_figure_holds_both_numbers_of_each_run() -> None:
    record = samples.demo()
    figure = must(recall_forgetting.draw(record))
    runs = facts_runs(record.runs)
    assert [t["x"][0] for t in figure.data] == pytest.approx([r.forgetting for r in runs], rel=1e-5)
    assert [t["y"][0] for t in figure.data] == [r.bits_per_person for r in runs]


def test_labels_of_close_points_stay_apart() -> None:
    """Two points 9 px apart cannot both have their label on the same side."""
    first, second = label_places([(0.5, 0.5), (0.5, 0.53)], ["rank 8", "rank 64"])
    assert first != second
    assert label_places([(0.99, 0.5)], ["a long label indeed"])[0].endswith("left")
    assert label_places([], []) == []


def test_run_verdicts_say_how_it_ended() -> None:
    assert run_verdict(samples.run()) == (
        "Done after 500 steps. Rank 64, alpha / √r, learning rate 0.003. 39,144 of 46,600 bits (84 %) recalled above "
        "the base; 84 % of the facts exact (base: 0.4 %), 71.4 % when asked in held-out words. On text that the base "
        "already modelled the loss rose by 0.132 nats a token."
    )
    diverged = run_verdict(samples.diverged())
    assert diverged.startswith("Diverged: what follows is of the last good adapter, that of step 200.")
    assert "The bits recalled are unknown" in diverged
    assert diverged.endswith("Forgetting is unknown.")
    failed = run_verdict(samples.failed())
    assert failed.startswith("Failed after 0 of 500 steps.")
    assert failed.endswith("Recall was not measured. Forgetting was not measured.")
    told = run_verdict(samples.interrupted())
    assert "The completions cost 40,000 bits less than with the base, of 50,000 (80 %)" in told
    assert "the loss fell by 0.001 nats" in told
    assert "recalled" not in told, "without pools the bits are loss saved"
    planned = samples.run(config=replace(samples.CONFIG, plan="plan.json"))
    assert "Ranks of a plan, alpha / √r" in run_verdict(planned)


def test_why_a_run_ended_stands_before_everything_else() -> None:
    html = render_page(samples.diverged())
    assert html.index("at step 265 the loss is nan") < html.index('<h2 id="findings">')
    assert 'id="ended"' not in render_page(samples.run())


def test_a_failed_run_has_a_page_without_figures() -> None:
    assert figures_of(samples.failed()) == []
    html = text_of(render_page(samples.failed()))
    assert "out of memory: 8.1 GiB wanted" in html
    assert "gradients clipped never" in html


def test_losses_are_drawn_as_recorded_and_a_loss_that_is_no_number_is_a_gap() -> None:
    record = samples.diverged()
    figure = must(loss_curve.draw(record))
    loss, rate = figure.data
    assert loss["x"] == rate["x"] == [p.step for p in record.losses]
    assert loss["y"][:-1] == pytest.approx([p.loss for p in record.losses[:-1]], rel=1e-5)
    assert loss["y"][-1] is None
    assert rate["y"] == pytest.approx([p.learning_rate for p in record.losses], rel=1e-5)
    assert figure.detail == "1 point without a finite loss is a gap"
    assert figure.layout["shapes"][0]["x0"] == 200
    assert figure.layout["annotations"][0]["text"] == "diverged: adapter of step 200"
    assert must(loss_curve.draw(samples.run())).layout["shapes"] == []


def test_loss_axis_is_logarithmic_only_where_the_loss_falls_far() -> None:
    far, near = must(loss_curve.draw(samples.run())), must(loss_curve.draw(samples.interrupted()))
    assert far.layout["yaxis"]["type"] == "log"
    assert "log scale" in far.layout["yaxis"]["title"]["text"]
    assert near.layout["yaxis"]["range"][0] == 0
    zero = (
        samples.LossPoint(step=1, loss=5.0, learning_rate=0.1),
        samples.LossPoint(step=2, loss=0.0, learning_rate=None),
    )
    assert "type" not in must(loss_curve.draw(samples.run(losses=zero))).layout["yaxis"]


def test_long_curves_are_thinned_and_the_page_says_so() -> None:
    record = samples.run(losses=samples.losses(5000, 1))
    figure = must(loss_curve.draw(record))
    assert len(figure.data[0]["x"]) == loss_curve.MOST_POINTS
    assert figure.data[0]["x"][-1] == 5000
    assert "2,000 points, evenly chosen, are drawn of 5,000" in figure.detail
    assert figure.fallback is not None
    assert len(figure.fallback.rows) == loss_curve.MOST_ROWS
    assert "25 of 5,000 points" in figure.fallback.caption
    looks = must(health.draw_branch_ratio(samples.run(health=samples.health(tuple(range(1, 1001))))))
    assert len(looks.data[0]["x"]) == health.MOST_STEPS
    assert "400 steps, evenly chosen, are drawn of 1,000" in looks.detail
    assert len(render_page(record)) < 1_700_000


@pytest.mark.parametrize("n", [0, 1, 2, 24, 25, 26, 1000])
def test_evenly_keeps_both_ends(n: int) -> None:
    places = evenly(n, 25)
    assert len(places) == min(n, 25)
    assert places == sorted(set(places))
    assert not n or (places[0], places[-1]) == (0, n - 1)


@pytest.mark.parametrize(
    ("draw", "field"), [(health.draw_branch_ratio, "branch_ratio"), (health.draw_effective_rank, "effective_rank")]
)
def test_health_lines_are_those_of_the_groups(draw: Any, field: str) -> None:
    record = samples.run()
    figure = must(draw(record))
    lines = {t["name"]: t for t in figure.data if "lines" in t["mode"]}
    assert set(lines) == {"all", *samples.GROUPS}
    for group, line in lines.items():
        rows = [h for h in record.health if h.group == group]
        assert line["x"] == [h.step for h in rows]
        assert line["y"] == pytest.approx([getattr(h, field) for h in rows], rel=1e-5)
    assert len({(t["line"]["color"], t["line"]["dash"]) for t in lines.values()}) == len(lines), "told apart"


def test_starved_groups_are_marked_in_the_plot_in_words_and_in_the_table() -> None:
    figure = must(health.draw_branch_ratio(samples.diverged()))
    (starved,) = [t for t in figure.data if t["name"] == "starved"]
    assert starved["x"] == [100, 200]
    assert set(starved["customdata"]) == {"mlp/late"}
    assert figure.marks == ("Marked starved: mlp/late at 2 of 4 looks.",)
    assert figure.layout["yaxis"]["type"] == "log", "0.003 beside 0.6"
    assert figure.fallback is not None
    assert [row[-1].endswith("starved") for row in figure.fallback.rows] == [False, False, True, True]


def test_health_without_numbers_is_left_out() -> None:
    rows = tuple(replace(h, branch_ratio=None) for h in samples.health())
    assert health.draw_branch_ratio(samples.run(health=rows)) is None
    assert health.draw_effective_rank(samples.run(health=rows)) is not None
    zero = tuple(replace(h, branch_ratio=0.0) for h in samples.health((10,)))
    assert must(health.draw_branch_ratio(samples.run(health=zero))).data[0]["y"] == [0]


def test_splits_are_means_over_their_facts_beside_the_base() -> None:
    record = samples.measured()
    figure = must(recall_splits.draw(record))
    bits, possible, tuned, base = figure.data
    found = recall_splits.splits(record.recall)
    assert list(found) == bits["x"] == ["training words", "held-out words", "never trained"]
    for place, score in enumerate(found.values()):
        assert score.bits is not None
        assert score.bits_possible is not None
        assert bits["y"][place] == pytest.approx(score.bits / score.facts, rel=1e-5)
        assert possible["y"][place] == pytest.approx(score.bits_possible / score.facts, rel=1e-5)
        assert tuned["y"][place] == pytest.approx(score.exact_share, rel=1e-5)
        assert base["y"][place] == pytest.approx(score.base_exact_share, rel=1e-5)


def test_a_split_without_bits_is_said_to_be_unknown() -> None:
    figure = must(recall_splits.draw(samples.diverged()))
    assert figure.marks == ("The bits recalled are unknown: training words.",)
    assert figure.layout["xaxis"]["ticktext"] == ["training<br>words<br>unknown of 9.32"]


def test_an_answer_that_follows_from_another_has_no_bar() -> None:
    """The work city follows from the employer: it holds 0 bits, whatever the loss saved on it."""
    record = samples.measured()
    figure = must(recall_attributes.draw(record))
    bars, ends = figure.data
    for place, row in enumerate(record.recall.by_attribute):
        free = row.bits_possible != 0
        assert bars["x"][place] == (pytest.approx(row.bits_per_fact, rel=1e-5) if free else None)
        assert ends["x"][place] == (pytest.approx(row.bits_possible, rel=1e-5) if free else None)
    assert figure.layout["yaxis"]["ticktext"][-1] == "work city<br>84 % exact, no bits"
    assert "follows from another one" in " ".join(figure.caption)


def test_without_pools_the_words_are_of_loss_and_completions() -> None:
    record = samples.interrupted()
    assert record.recall is not None
    assert recall_facts(record.recall)[0][0] == "bits of loss saved"
    caption = " ".join(must(recall_splits.draw(record)).caption)
    assert "No pool of answers is known here" in caption
    assert "720 completions in training words" in caption
    assert recall_attributes.draw(record) is None


def test_recall_of_nothing_known_has_a_page() -> None:
    record = samples.measured_nothing()
    assert recall_verdict(record) == (
        "The bits recalled are unknown; 0 % of the completions exact. Forgetting was not measured."
    )
    assert "What “rankwise:tiny” recalls of" in render_page(record)


def test_config_has_every_field_in_words() -> None:
    rows = dict(config_rows(samples.CONFIG))
    assert rows["scaling"] == "rslora: alpha / √r"
    assert rows["gradients clipped"] == "to norm 1"
    assert rows["batch"] == "64 examples a step, in 1 forward pass"
    elsewhere = {"model", "data", "data_digest", "learning_rate", "steps", "groups"}
    joined = {"warmup_steps", "gradient_accumulation"}  # in one row with the schedule, and with the batch
    assert len(rows) == len(set(samples.CONFIG.__struct_fields__) - elsewhere - joined)
