import subprocess
import sys

LIGHT = ("networks", "losses", "schedules", "optim", "errors", "run.directory")


def test_light_parts_do_not_import_lightning():
    code = "".join(f"import firstlight.{part}\n" for part in LIGHT) + "import sys; print('lightning' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_help_imports_nothing_heavy():
    code = "from firstlight.__main__ import main; main(['--help']); import sys; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()[-1] == "False"
