"""`firstlight report` and the report at the end of `run`: what they say, and what a browser shows of them."""

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, roc_auc_score

from firstlight.run.report import write
from tests.helpers import ROOT, called, newest


class Page(HTMLParser):
    """The words, tables and addresses of a page."""

    def __init__(self, text):
        super().__init__()
        self.words, self.addresses, self.ids, self.pictures, self.roles = [], [], [], [], []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.addresses += [attrs[name] for name in ("href", "src", "xlink:href") if name in attrs]
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.pictures += [attrs] if tag == "img" else []
        self.roles += [attrs.get("aria-label")] if attrs.get("role") == "img" else []

    def handle_data(self, data):
        self.words.append(data)


def outputs_of(run, split="test"):
    with np.load(run / "outputs" / f"{split}.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    printed = called(
        "run", "--config", f"{ROOT}/configs/digits_mlp.yaml", "--trainer.max_epochs", "3", "--disable=progress",
        cwd=folder,
    ).stdout  # fmt: skip
    return newest(folder), printed


def test_run_writes_a_report_and_prints_its_path(digits):
    run, printed = digits
    path = re.search(r"^report (\S+)$", printed, re.MULTILINE)[1]
    assert path.endswith(f"{run.name}/report.html")
    assert (run / "report.html").is_file()


def test_the_page_needs_no_network_and_its_links_lead_somewhere(digits):
    page = Page((digits[0] / "report.html").read_text())
    assert page.addresses
    for address in page.addresses:
        assert address.startswith("data:image/png") or address.removeprefix("#") in page.ids, address[:80]
    assert len(page.ids) == len(set(page.ids))


def test_charts_and_pictures_have_descriptions(digits):
    page = Page((digits[0] / "report.html").read_text())
    assert len(page.roles) >= 6 and all(page.roles)
    assert all(each.get("alt") for each in page.pictures)


def test_the_figures_are_those_of_the_run(digits):
    run = digits[0]
    page = Page((run / "report.html").read_text())
    results = json.loads((run / "results.json").read_text())
    assert f"{results['best']['val/loss']:,.4g}" in page.text
    assert f"{results['metrics']['test/accuracy']:,.4g}" in page.text
    stored = outputs_of(run)
    right = int((stored["outputs"].argmax(1) == stored["targets"]).sum())
    assert f"{right:,} of {len(stored['targets']):,} test samples are right" in page.text
    areas = [roc_auc_score(stored["targets"] == label, stored["outputs"][:, label]) for label in range(10)]
    assert f"{np.mean(areas):.4f}, the mean of one class against the others" in page.text
    for line in (run / "config.yaml").read_text().splitlines():
        assert " ".join(line.split()) in page.text
    with (run / "metrics.csv").open() as file:
        last = [row for row in csv.DictReader(file) if row["name"] == "train/loss"][-1]
    assert f"Training ends at {float(last['value']):,.4g}" in page.text


def test_curves_and_results_count_the_same_steps(digits, tmp_path):
    run = shutil.copytree(digits[0], tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    curves = write(run, "md").read_text()
    steps = [int(found.replace(",", "")) for found in re.findall(r"^\| ([\d,]+) \|", curves, re.MULTILINE)]
    assert results["best"]["step"] in steps and results["steps"] in steps


def test_the_confusion_matrix_is_that_of_scikit_learn(digits, tmp_path):
    run = tmp_path / "digits_mlp" / "run"
    shutil.copytree(digits[0], run)
    text = write(run, "md").read_text()
    stored = outputs_of(run)
    expected = confusion_matrix(stored["targets"], stored["outputs"].argmax(1))
    section = text.split("## Confusion matrix")[1].split("##")[0]
    rows = [line.strip("| ").split(" | ")[1:] for line in section.splitlines() if re.match(r"\| \d \|", line)]
    assert (np.array(rows, int) == expected).all()
    for chart in re.findall(r"\((report/\S+\.svg)\)", text):
        assert (run / chart).read_text().startswith("<svg") and "var(" not in (run / chart).read_text()


def test_errors_are_the_surest_and_shown(digits):
    run = digits[0]
    stored = outputs_of(run)
    guesses, sure = stored["outputs"].argmax(1), stored["outputs"].max(1)
    wrong = np.flatnonzero(guesses != stored["targets"])
    first = wrong[sure[wrong].argmax()]
    page = Page((run / "report.html").read_text())
    assert f"{stored['targets'][first]} taken for {guesses[first]} ({sure[first]:.0%})" in page.text


def test_a_page_shows_text_of_names_and_findings_and_runs_no_code_of_them(digits, tmp_path):
    run = tmp_path / "digits_mlp" / "run"
    shutil.copytree(digits[0], run)
    results = json.loads((run / "results.json").read_text())
    text = "<script>alert(1)</script> & more"
    finding = {"name": "overfitting", "severity": "warning", "epoch": 2, "step": 79, "text": text, "advice": "less"}
    (run / "results.json").write_text(json.dumps({**results, "findings": [{**finding, "evidence": {"gap": 0.51234}}]}))
    source = write(run).read_text()
    assert "<script" not in source
    page = Page(source)
    assert text in page.text and "since epoch 3, step 80" in page.text and "0.5123" in page.text
    assert "#loss" in page.addresses


def test_a_run_without_results_outputs_or_curves_is_told_or_reported(digits, tmp_path):
    run = tmp_path / "digits_mlp" / "run"
    shutil.copytree(digits[0], run)
    shutil.rmtree(run / "outputs")
    (run / "metrics.csv").unlink()
    assert "Confusion" not in write(run).read_text()
    (run / "results.json").unlink()
    assert "has no results.json yet" in called("report", "--run", str(run), cwd=tmp_path, code=2).stderr
    assert "report needs a run" in called("report", cwd=tmp_path, code=2).stderr


def test_damaged_files_end_in_one_line(digits, tmp_path):
    run = tmp_path / "digits_mlp" / "run"
    shutil.copytree(digits[0], run)
    (run / "outputs" / "test.npz").write_bytes(b"PK\x03\x04 no archive")
    error = called("report", "--run", str(run), cwd=tmp_path, code=2).stderr
    assert error.count("\n") == 1 and "test.npz is damaged" in error
    (run / "outputs" / "test.npz").unlink()
    (run / "metrics.csv").write_bytes(
        b"step,name,value\n1,train/loss,0.5\n2,train/loss,\xff\n\0,,\nx,y,z\n3,train/loss,nan\n"
    )
    (run / "outputs" / "examples.json").write_text("[1]")
    assert "0.5" in write(run).read_text()


def test_without_report_none_is_written(tmp_path):
    printed = called(
        "run", "--config", "firstlight:wine", "--trainer.max_epochs", "1", "--report", "false", cwd=tmp_path
    ).stdout
    assert "\nreport " not in printed and not (newest(tmp_path, "wine") / "report.html").exists()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("diabetes", ["R²", "Residuals", "root mean square", "Largest errors"]),
        ("breast_cancer", ["ROC curve", "Calibration", "Confusion matrix"]),
        ("letters", ["Confusion matrix", "taken for"]),
    ],
)
def test_other_kinds_of_targets_have_their_charts(config, words, tmp_path):
    called("run", "--config", f"firstlight:{config}", "--trainer.max_epochs", "2", cwd=tmp_path)
    page = Page((newest(tmp_path, config) / "report.html").read_text())
    assert [word for word in words if word not in page.text] == []


@pytest.mark.slow
def test_a_browser_draws_every_chart_in_the_light_and_in_the_dark_and_on_a_phone(digits, tmp_path):
    chromium = shutil.which("chromium") or pytest.skip("no chromium here")
    page = (digits[0] / "report.html").read_text()
    # The page measures itself, and the browser prints what it became.
    script = """<script>addEventListener("load", () => { const sizes = [...document.querySelectorAll("svg")].map(
        each => each.getBoundingClientRect()); document.body.dataset.result = JSON.stringify({charts: sizes.length,
        drawn: sizes.filter(each => each.width > 100 && each.height > 60).length,
        wide: document.documentElement.scrollWidth - innerWidth}); })</script></body>"""
    (tmp_path / "page.html").write_text(page.replace("</body>", script))
    for size in ("1200,900", "500,900"):
        options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
        done = subprocess.run(
            [chromium, *options.split(), f"--user-data-dir={tmp_path}/{size}", f"--window-size={size}", "--dump-dom",
             f"file://{tmp_path}/page.html"], capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        found = json.loads(re.search(r'data-result="([^"]+)"', done.stdout)[1].replace("&quot;", '"'))
        assert found["charts"] == found["drawn"] >= 6 and found["wide"] <= 0, found
