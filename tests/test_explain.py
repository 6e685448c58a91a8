"""The page of `progtuning explain`: its numbers against `plan --json`, and in a real Chromium how it is laid out."""

import base64
import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from progtuning.cli.command import build_parser, main
from progtuning.cli.explain import document_of_runs, explained_document, read_comparison
from progtuning.cli.plan import Asked
from progtuning.cost.closed_form import units
from progtuning.report.explained import explained_page, thinned
from progtuning.stages import EMBEDDING_POLICIES
from tests.test_cli import FAST, call, refused

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

RUNS = {
    "shrinking": ["--batch-size", "8"],
    "lora": ["--peft", "lora", "--lora-targets", "value,output", "--length", "32", "--cache", "memory"],
    "adapters": ["--peft", "adapter", "--adapter-embedding-layer-norm", "--schedule", "growing"],
    "biases": ["--peft", "bitfit", "--calendar", "0:2,4:1,12:1", "--head", "question-answering"],
    "spafit": ["--peft", "spafit", "--schedule", "without-low-blocks", "--embeddings", "always"],
    "adaptive": ["--schedule", "adaptive"],
    "checkpointed": ["--checkpoint-activations", "--device", "cuda", "--precision", "bf16"],
}


MODEL = ["--model", "bert-base-uncased", "--rows", "200"]


def asked(*options):
    return build_parser().parse_args(["explain", *MODEL, *options, "-o", "page.html"])


def planned(capsys, *options) -> dict:
    assert main(["plan", *MODEL, *options, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_the_document_has_the_plan_of_each_policy_and_its_units_add_up_to_it(options, capsys):
    document = explained_document(Asked.of(asked(*options)))
    for policy in EMBEDDING_POLICIES:
        explained, plan = document["policies"][policy], planned(capsys, *options, "--embeddings", policy)
        assert explained["plan"] == plan
        for stage, planned_stage in zip(explained["stages"], plan["stages"], strict=True):
            parts = [document["units"][number] for number in stage["units"]]
            assert len(parts) == plan["num_blocks"] + 2
            for key in (
                "forward_flops",
                "trainable_parameters",
                "gradient_bytes",
                "optimizer_bytes",
                "parameter_bytes",
            ):
                assert sum(part[key] for part in parts) == planned_stage[key]
            kept = sum(part["activation_bytes"] for part in parts) + stage["kept_again"]
            backward = sum(part[f"{pass_}_flops"] for part in parts for pass_ in ("again", "input", "weight"))
            assert [kept, backward] == [planned_stage["activation_bytes"], planned_stage["backward_flops"]]
            assert (stage["kept_again"] > 0) == ("--checkpoint-activations" in options)
            assert stage["of_full"]["backward_flops"] == planned_stage["share_of_full"]


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_a_gradient_is_for_the_lowest_parameter_that_trains_below_it_and_none_where_none_does(options):
    run = Asked.of(asked(*options))
    document = explained_document(run)
    for (stage, _), explained in zip(
        run.schedule(run.settings).planned, document["policies"][run.settings.embeddings]["stages"]
    ):
        trained = [bool(unit.trainable) for unit in units(run.config, run.settings.peft).during(stage)]
        lowest = trained.index(True)
        where = "E" if lowest == 0 else "H" if lowest == len(trained) - 1 else f"block {lowest}"
        for number, part in enumerate(document["units"][one] for one in explained["units"]):
            for product in part["products"]:
                if number > lowest:
                    assert product["input"] and product["input_why"].startswith(f"for {where}, ")
                elif number < lowest:
                    assert not product["input"] and not product["weight"] and part["state"] == "cut"
                    assert product["input_why"] == "nothing below it trains"


def test_a_frozen_weight_is_frozen_by_the_stage_or_by_the_method():
    document = explained_document(Asked.of(asked(*RUNS["lora"])))
    last = document["policies"]["never"]["stages"][-1]["units"]
    for number, block in ((1, "frozen in this stage"), (12, "it trains")):
        why = {one["name"]: one["weight_why"] for one in document["units"][last[number]]["products"]}
        assert why["attention.self.value.lora_A"] == block and why["attention.self.key"] == "lora never trains it"


def test_a_page_has_at_most_200_stages_and_its_text_cannot_end_the_script(tmp_path, capsys):
    output = tmp_path / "new" / "page.html"
    command = ["explain", *MODEL, "-o", str(output)]
    assert main([*command, "--stages", "201"]) == 2 and not output.exists()
    assert "--schedule shrinking must have at most 200 stages for a page, got 201" in capsys.readouterr().err
    document = explained_document(Asked.of(asked())) | {"model": "</script><b>"}
    assert explained_page(document).count("</script>") == 2
    assert main(command) == 0 and output.stat().st_size < 100_000
    assert not re.search(r"https?:|src=|@import|url\(", output.read_text(encoding="utf-8"))


# What is looked at in each state of the page: its numbers, what lies over another text, what is cut off.
PROBE = """
<script>
const shown = (node) => !node.parentElement.closest(".hidden, script, style, noscript, [hidden]");
const lookAt = () => {
  const found = { numbers: [], loose: [], overlaps: [], cut: [], width: document.documentElement.scrollWidth };
  for (const one of document.querySelectorAll("data"))
    found.numbers.push([one.dataset.path, one.value, one.textContent]);
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), rects = [];
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    if (!node.textContent.trim() || !shown(node)) continue;
    const parent = node.parentElement, range = document.createRange();
    if (parent.closest("td") && /[0-9]/.test(node.textContent) && !parent.closest("data, .why"))
      found.loose.push(node.textContent);
    let box = parent;
    while (/inline$|contents/.test(getComputedStyle(box).display)) box = box.parentElement;
    const limit = box.getBoundingClientRect(), scrolls = parent.closest("#stairs");
    const right = scrolls?.getBoundingClientRect().right;
    range.selectNodeContents(node);
    for (const rect of range.getClientRects()) {
      if (rect.width < 1 || getComputedStyle(parent.closest("thead") ?? parent).clipPath !== "none") continue;
      if (scrolls && rect.right > right) continue;  // scrolled out of sight
      rects.push([node, rect]);
      const across = rect.left >= limit.left - 1 && rect.right <= limit.right + 1;
      const inside = across && rect.top >= limit.top - 3 && rect.bottom <= limit.bottom + 3;
      if (!inside || (!scrolls && (rect.left < 0 || rect.right > innerWidth))) found.cut.push(node.textContent.trim());
    }
  }
  rects.sort((a, b) => a[1].top - b[1].top);
  rects.forEach(([node, a], i) => {
    for (let j = i + 1; j < rects.length && rects[j][1].top < a.bottom - 3; j++) {
      const [other, b] = rects[j];
      if (other !== node && Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1)
        found.overlaps.push([node.textContent.trim(), other.textContent.trim()]);
    }
  });
  return found;
};
(async () => {
  const report = { inner: innerWidth, states: [], keys: [] };
  for (const policy of names)
    for (let stage = 1; stage <= doc.policies[policy].stages.length; stage += STEP)
      for (const unit of stage % 2 ? [1, blocks + 1] : [0, blocks]) {
        Object.assign(state, { policy, stage, unit });
        render();
        report.states.push({ policy, stage, unit, ...lookAt() });
      }
  report.scrolls = byId("stairs").scrollWidth > byId("stairs").clientWidth;
  Object.assign(state, { policy: names[0], stage: 1, unit: 1 });
  render();
  const keys = ["next ArrowRight", "stairs-1 ArrowRight", "stairs-1 ArrowLeft", "stairs-1 ArrowUp"];
  for (const [id, key] of keys.map((one) => one.split(" "))) {
    byId(id).focus();
    const done = new Promise((resolve) => addEventListener("hashchange", resolve, { once: true }));
    document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
    await done;
    report.keys.push([location.hash, byId("stage").textContent, document.activeElement.id]);
  }
  const named = (one) => one.textContent.trim() || one.labels?.length || one.ariaLabel || one.ariaLabelledByElements;
  const acting = [...document.querySelectorAll("button, a, input, [role=region]")];
  report.nameless = acting.filter((one) => !named(one)).length;
  parent.postMessage(JSON.stringify(report), "*");
})();
</script>
"""
# A window of a browser has a least width, a frame has none.
FRAME = """<!doctype html><iframe src="page.html" style="border: 0; width: WIDTHpx; height: 900px"></iframe>
<script>
addEventListener("message", (event) => {
  document.body.innerHTML = `<pre>${btoa(unescape(encodeURIComponent(event.data)))}</pre>`;
});
</script>
"""


def look(folder: Path, document: dict, width: int, every: int = 1) -> dict:
    """Return what the probe finds in the page at a width, in every policy, every so many stages, and two units."""
    page = explained_page(document).replace("</body>", PROBE.replace("STEP", str(every)) + "</body>")
    (folder / "page.html").write_text(page, encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --window-size=1400,1000 --virtual-time-budget=10000 --dump-dom"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={folder / 'profile'}", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search("<pre>([A-Za-z0-9+/=]+)</pre>", done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(base64.b64decode(found[1]))


@pytest.fixture(scope="module")
def run_folder(tiny_folder, tiny_task, tmp_path_factory) -> Path:
    """The output folder of a run of adapters under a calendar."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = ["--model", tiny_folder, "--task", "classification", "--data", tiny_task, "--peft", "adapter"]
    options += ["--calendar", "0:1,2:1,3:2", "--adapter-size", "4", "--matmul-peak", "1", "--output-dir", folder]
    status, _, err = call("train", *options, *FAST, "--epochs", "1")
    assert status == 0, err
    return folder


def of_run(folder: Path) -> dict:
    """Return the document of a run's page."""
    return document_of_runs([folder], build_parser().parse_args(["explain", "--run", str(folder), "-o", "page.html"]))


def test_a_runs_page_has_its_own_plan_and_beside_the_ideal_what_its_summary_and_log_say(run_folder, capsys):
    summary = json.loads((run_folder / "summary.json").read_text())
    document, counts = of_run(run_folder), summary["stages"]
    length = round(sum(one["slots"] for one in counts) / sum(one["examples"] for one in counts))
    options = ["--model", str(run_folder), "--calendar", "0:1,2:1,3:2", "--peft", "adapter", "--adapter-size", "4"]
    options += ["--batch-size", "8", "--length", str(length), "--rows", "320", "--epochs", "1", "--json"]
    assert main(["plan", *options]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert document["policies"]["with-block-1"]["plan"] == plan | {"model": summary["model"]}
    first, *_ = stages = document["runs"][0]["stages"]
    assert [one["steps"] for one in stages] == [one["steps"] for one in counts]
    for shown, stage, planned_stage in zip(stages, counts, plan["stages"], strict=True):
        assert shown["seconds"] == pytest.approx(sum(stage["seconds"].values()) / stage["steps"])
        assert shown["tokens_per_second"] == stage["speed"]["tokens_per_second"]
        assert shown["share_of_peak"] == stage["speed"]["share_of_matmul_peak"]
        assert shown["peak_bytes"] == stage["peak_bytes"]
        ideal = (stage["forward_flops"] + stage["backward_flops"]) / stage["steps"]
        ideal /= (counts[0]["forward_flops"] + counts[0]["backward_flops"]) / counts[0]["steps"]
        assert shown["ideal_seconds"] == pytest.approx(first["seconds"] * ideal)
        assert shown["ideal_tokens_per_second"] == pytest.approx(first["tokens_per_second"] / ideal)
        assert shown["planned_bytes"] == planned_stage["step_bytes"]
    log = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert document["runs"][0]["losses"] == [(row["step"], row["loss"]) for row in log if "loss" in row]
    assert document["runs"][0]["metrics"] == list(summary["metrics"].items())


def test_a_long_loss_is_thinned_by_its_means():
    points = thinned([(step, float(step)) for step in range(1, 1001)])
    assert len(points) == 334 and points[:2] == [(3, 2.0), (6, 5.0)] and points[-1] == (1000, 1000.0)


def test_what_is_no_run_or_has_no_log_is_refused_and_so_is_a_run_with_another_model(run_folder, tmp_path):
    output = ("-o", tmp_path / "page.html")
    assert "explain needs --model, or --run" in refused(*call("explain", *output))
    options = ["--rows", "9", "--device", "cuda", "--epochs", "2", "--peft", "lora"]
    line = refused(*call("explain", "--run", run_folder, *options, *output))
    assert "--run has a model and options of its own: leave out --rows, --device, --epochs, --peft" in line
    assert "summary.json: cannot be read" in refused(*call("explain", "--run", tmp_path, *output))
    assert "same file as the input" in refused(*call("explain", "--run", run_folder, "-o", run_folder / "summary.json"))
    bad = tmp_path / "bad"
    shutil.copytree(run_folder, bad)
    for text, message in (
        ('{"step": 1}\n', "no row has a loss"),
        ("[]\n5\n", "expected a JSON object a line"),
        ('{"step": 0, "loss": 1}\n', "metrics.jsonl: step must be an integer"),
        ('{"step": 1, "loss": NaN}\n', "metrics.jsonl: loss must be a number"),
    ):
        (bad / "metrics.jsonl").write_text(text)
        assert message in refused(*call("explain", "--run", bad, *output))
    (bad / "metrics.jsonl").unlink()
    assert "metrics.jsonl: cannot be read" in refused(*call("explain", "--run", bad, *output))
    summary = json.loads((bad / "summary.json").read_text())
    for settings in ({"epochs": "3"}, {"peft": {"method": "adapter", "lora_targets": 5}}, {"calendar": 5}):
        (bad / "summary.json").write_text(json.dumps(summary | {"settings": summary["settings"] | settings}))
        assert "settings is not what train writes" in refused(*call("explain", "--run", bad, *output))
    assert not (tmp_path / "page.html").exists()


def of_text(text: str) -> float:
    """Return the number that a text such as "178.8 G" or "1.5 MiB" says."""
    number, _, unit = text.replace(",", "").replace("\u2212", "-").partition(" ")
    base = 1024 if unit.endswith("B") else 1000
    return float(number) * base ** " kMGTPE".replace("k", "K").index(
        (unit[:1].upper() if unit not in ("", "B") else " ")
    )


def check_states(report: dict, document: dict, width: int) -> None:
    assert report["inner"] == width and report["nameless"] == 0
    for state in report["states"]:
        where = {key: state[key] for key in ("policy", "stage", "unit")}
        assert state["width"] <= width, where
        assert [state["cut"], state["overlaps"], state["loose"]] == [[], [], []], where
        for path, value, text in state["numbers"]:
            known = document
            for key in path.split("/"):
                known = known[int(key)] if isinstance(known, (list, tuple)) else known[key]
            assert float(value) == known, (where, path)
            assert of_text(text) == pytest.approx(known, rel=6e-4, abs=0.006 if known < 10 else 0), (where, path, text)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What is seen of BERT-base's three stages at a width, looked at once: (report, document)."""
    document = explained_document(Asked.of(asked("--batch-size", "8")))
    return cache(lambda width: (look(tmp_path_factory.mktemp("page"), document, width), document))


@in_chromium
@pytest.mark.parametrize("width", [360, 1280])
def test_in_a_browser_every_number_is_the_documents_and_no_text_is_cut_off_or_lies_over_another(width, seen):
    report, document = seen(width)
    assert len(report["states"]) == 3 * 3 * 2 and not report["scrolls"]
    check_states(report, document, width)
    shown = {path for state in report["states"] for path, *_ in state["numbers"]}
    for policy in EMBEDDING_POLICIES:
        for i, stage in enumerate(document["policies"][policy]["plan"]["stages"]):
            keys = stage.keys() - {"stage", "active_blocks", "embeddings", "share_of_full", "gradient_sum_bytes"}
            assert {f"policies/{policy}/plan/stages/{i}/{key}" for key in keys} <= shown


CELL = {"schedule": "full", "lr": 1e-4, "seeds": 2, "metric": 0.5, "cost": 0.4, "seconds": 9.0, "budget": 0.5}
CELL |= {"updated_parameters": 10, "failed": 0}
BETTER = CELL | {"schedule": "4+cache", "metric": 0.6, "to_full": [0.1, 0.05, 0.2]}
COMPARISON = {"metric": "f1", "advice": "Use it.", "account": [], "cells": [CELL, BETTER, {"budget": 1.0}]}


def test_a_comparison_stands_beside_with_the_best_of_each_budget_marked_and_is_checked(tmp_path):
    file = tmp_path / "compare.json"
    command = ("explain", *MODEL, "--comparison", tmp_path, "-o", tmp_path / "page.html")
    cells = (5, CELL | {"to_full": [1]}, CELL | {"cost": "0.4"}, {"metric": 1})
    for wrong in ([], {}, *(COMPARISON | {"cells": [one]} for one in cells)):
        file.write_text(json.dumps(wrong))
        assert "compare.json: expected the document that compare writes" in refused(*call(*command))
    file.write_text(json.dumps(COMPARISON))
    found = read_comparison(tmp_path)
    assert [one["best"] for one in found["cells"]] == [False, True] and found["metric"] == "f1"
    assert call(*command)[0] == 0


@in_chromium
def test_in_a_browser_a_page_shows_every_number_of_its_runs_and_of_its_comparison(run_folder, tmp_path):
    (tmp_path / "compare.json").write_text(json.dumps(COMPARISON))
    document = of_run(run_folder) | {"comparison": read_comparison(tmp_path)}
    report = look(tmp_path, document, 360)
    check_states(report, document, 360)
    shown = {path for path, *_ in report["states"][0]["numbers"]}
    of_stage = {path.split("/")[4] for path in shown if path.startswith("runs/0/stages/1/")}
    assert of_stage == document["runs"][0]["stages"][1].keys() - {"stage", "trains", "end"}
    assert {f"comparison/cells/1/{key}" for key in ("metric", "cost", "to_full/0", "to_full/2", "lr")} <= shown


@in_chromium
def test_in_a_browser_24_stages_of_checkpointed_lora_scroll_in_the_staircase_alone(tmp_path):
    document = explained_document(Asked.of(asked("--epochs", "24", "--peft", "lora", "--checkpoint-activations")))
    report = look(tmp_path, document, 360, every=24)
    assert report["scrolls"]
    check_states(report, document, 360)


@in_chromium
def test_in_a_browser_arrow_keys_step_through_stages_and_units_and_keep_the_focus(seen):
    assert seen(1280)[0]["keys"] == [
        ["#with-block-1/2/1", "Stage 2 of 3", "next"],
        ["#with-block-1/3/1", "Stage 3 of 3", "stairs-1"],
        ["#with-block-1/2/1", "Stage 2 of 3", "stairs-1"],
        ["#with-block-1/2/2", "Stage 2 of 3", "stairs-2"],
    ]
