"""What a checkpoint's hyper-parameters may hold: every value is judged before it is used."""

import inspect
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from firstlight.checkpoints.allowed import allowed_classes, judge, without_locations
from firstlight.errors import UsageError
from tests.helpers import Ranks


def refused(values, **options):
    with pytest.raises(UsageError) as error:
        judge(values, "a.ckpt", **options)
    message = str(error.value)
    assert message.startswith("a.ckpt ") and message.isprintable() and len(message) < 400
    return message


def nested(value, depth):
    for _ in range(depth):
        value = [value]
    return value


def shared(depth):
    """Return a list whose values are shared: 2**depth of them, but only `depth` lists."""
    value = [1]
    for _ in range(depth):
        value = [value, value]
    return value


def loop():
    value = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(2), "holds x, a Tensor: hyper-parameters must be plain values"),
        ({1: 2}, "a mapping with the key a int"),
        ({"k" * 20_000: 2}, "a mapping with the key kkk"),
        pytest.param(10**5000, "a whole number of more than 64 bits", id="a large number"),
        ("x" * 20_000, "a text of more than 10,000 characters"),
        ("[&a [1, 1], &b [*a, *a]]", "a YAML alias"),
        (nested(1, 10_000), "of more than 32 levels"),
        (loop(), "of more than 32 levels"),
        (shared(25), "of more than 100,000 values"),
        ([0] * 200_000, "of more than 100,000 values"),
        ({"class_path": 3}, "names a int, which is not a class"),
        ({"class_path": "http://host/x"}, "which is not a class"),
        ({"class_path": ["torch.nn.ReLU", "os.system"]}, "names a list, which is not a class"),
        ("\x1b[2J\n/etc", None),
        ("a\0b", "a location"),
    ],
)
def test_value_that_is_not_plain_is_refused_in_one_line(value, message):
    if message is None:
        judge({"x": value}, "a.ckpt")  # It is a text without a meaning.
    else:
        assert re.search(message, refused({"x": value}))


LOCATIONS = [
    "http://host/x", "https://host", "s3://bucket/x", "file:///etc/passwd", "reference://x::http://host", "a::b",
    "simplecache::x.yaml", "data:text/plain,x", "file:x", "/etc/passwd", "~/x", "~root/x", "./x", "../x", "..",
    "a/../b", "C:\\x", "C:/x", "\\\\host\\share",
]  # fmt: skip
PLAIN = ["val/loss", "val/bits_per_byte", "price/m2", "a: b", "class 1", "50 %", "km/h", "", "a.b", "{x}", "R&D"]


@pytest.mark.parametrize("text", LOCATIONS)
def test_location_is_refused_at_every_place_and_not_saved(text):
    for values in ({"x": text}, {"x": [text]}, {"x": {"init_args": {"y": [[text]]}}}, {"x": ({"y": text},)}):
        assert "a location: a checkpoint may hold no path and no address" in refused(values)
        judge(without_locations(values), "a.ckpt")


@pytest.mark.parametrize("name", ["path", "root", "data_dir", "weights_path", "url", "files", "init_args.path"])
def test_option_that_is_a_location_by_its_name_is_refused_and_not_saved(name):
    assert f"holds x.{name}=wine.csv, a location" in refused({"x": {name: "wine.csv"}})
    assert without_locations({"x": {name: "wine.csv", "y": 1}}) == {"x": {"y": 1}}
    judge({name: None}, "a.ckpt")


def test_download_is_refused_and_not_saved():
    assert "holds download=a bool, a location" in refused({"download": True})
    assert without_locations({"download": True, "y": 1}) == {"y": 1}
    judge({"download": False}, "a.ckpt")


@pytest.mark.parametrize("text", PLAIN)
def test_text_that_is_no_location_is_kept(text):
    judge({"x": text, "y": [{"z": text}]}, "a.ckpt")
    assert without_locations({"x": text, "y": [{"z": text}]}) == {"x": text, "y": [{"z": text}]}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(LOCATIONS + PLAIN),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.just("path"), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(st.dictionaries(st.text(max_size=6), VALUES, max_size=4))
def test_saved_values_hold_no_location(values):
    try:
        judge(without_locations(values), "a.ckpt")
    except UsageError as error:
        assert "location" not in str(error)


def test_class_of_a_trusted_module_may_be_named():
    own = {"network": {"class_path": "my_project.nets.Net"}}
    judge(own, "a.ckpt", trust=["my_project"])
    assert "if you trust my_project" in refused(own)
    assert "if you trust my_project" in refused(own, trust=["my_projects", "my"])


def test_listed_classes_are_parts_under_the_names_that_configs_use():
    classes = allowed_classes()
    for name in (
        "torch.nn.ReLU", "torch.nn.CrossEntropyLoss", "torch.optim.AdamW", "torch.nn.modules.loss.MSELoss",
        "torchmetrics.MeanMetric", "torchmetrics.MeanSquaredError", "torchmetrics.classification.BinaryAUROC",
        "firstlight.networks.MLP", "firstlight.networks.mlp.MLP", "firstlight.schedules.Cosine",
        "firstlight.data.Table",
    ):  # fmt: skip
        assert inspect.isclass(classes[name])
    packages = ("firstlight.", "torch.nn.modules.", "torch.optim.", "torchmetrics.")
    assert all(
        each.__module__.startswith(packages) or each.__module__ in ("torch.nn.modules", "torch.optim")
        for each in classes.values()
    )


OPENS = """
import inspect, sys, warnings
warnings.simplefilter("ignore")
from torch import nn
from firstlight.checkpoints.allowed import allowed_classes
classes = set(allowed_classes().values())
found, built, active = [], 0, False
def hook(event, args):
    if active and event in ("open", "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system"):
        if not str(args[0]).startswith((sys.prefix, sys.base_prefix)):  # An import of the library itself.
            found.append((event, str(args[0])))
sys.addaudithook(hook)
for cls in sorted(classes, key=lambda cls: cls.__module__ + cls.__name__):
    if cls.__module__.startswith("firstlight."):
        continue  # Their files are their own.
    names = [name for name, each in inspect.signature(cls).parameters.items() if each.kind in (0, 1, 3)]
    texts = {name: "x.txt" for name in names if "path" in name or "file" in name or "weights_path" in name}
    for size in range(4):
        active = True
        try:
            cls(*[4] * size, **texts)
            built += 1
        except Exception:
            pass
        finally:
            active = False
    if texts:
        found.append((cls, texts))
print(built)
assert not found, found
"""


def execute(code):
    exec(code, {})


def test_no_listed_class_of_a_library_opens_a_file_or_an_address_when_it_is_built(tmp_path):
    assert int(Ranks(execute, OPENS, cwd=tmp_path).succeed().stdout) > 300
