"""The course runner finds what fails, names it, and writes nothing half; exercises never raise."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from queue import Empty

import nbformat
import numpy as np
import pytest
import torch
import zmq
import zmq.asyncio
from jupyter_client.session import Session
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import refiner
from refiner import course
from refiner.base import places
from refiner.course import execute
from refiner.course import run as runner
from refiner.course.pages import write_index

FIGURE = (
    "from refiner.visuals import plots\nplots.style()\nplots.style()\n"
    "plots.block_curve({'a': [0.25, 0.5]}, best=False, title='Votes <b>');"
)
RECORDS_ITS_PROCESS = (  # as refiner.record would, without its seconds of imports
    "import json, os, pathlib\n"
    "pathlib.Path(os.environ['REFINER_RECORD']).write_text(json.dumps({'pid': os.getpid()}))"
)


def parameters(source):
    return new_code_cell(source, metadata={"tags": ["parameters"]})


def write(folder, name, *sources, **meta):
    """A notebook with a title and these code cells (texts or cells)."""
    cells = [s if not isinstance(s, str) else new_code_cell(s) for s in sources]
    notebook = new_notebook(cells=[new_markdown_cell(f"# What is {name}?"), *cells])
    notebook.metadata["kernelspec"] = {"name": "nowhere", "display_name": "", "language": "python"}
    notebook.metadata["refiner"] = meta
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / f"{name}.ipynb")


def code_cells(path):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


def streams(cell):
    return "".join(o.text for o in cell.outputs if o.output_type == "stream")


# ---------------------------------------------------------------- one run, many notebooks


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One course of good and bad notebooks, with broken kernels installed beside it."""
    root = tmp_path_factory.mktemp("course")
    books = root / "notebooks"
    write(
        books,
        "00_good",
        parameters('preset = "cpu"\nsteps = 3  # as in: n = 3\nrate = 0.5'),
        "import os, sys\nimport refiner\nprint(preset, steps, sys.executable)",
        "refiner.record('pid', os.getpid())\nrefiner.record('knn', 0.25)\n"
        "refiner.record('blocks', [0.1, 0.2, 0.4])",
        "import ipywidgets as W\nfrom tqdm.auto import tqdm\nW.interact(lambda x: print(x), x=3)\n"
        "for _ in tqdm(range(3)):\n    pass",
        FIGURE,
        minutes_cpu=0.5,
    )
    write(books, "01_bad", "x = 1", "\n\nfoo = x  # <b>\nraise ValueError('no such\\nthing')", "2")
    write(
        books,
        "02_hidden",
        "import threading\nimport ipywidgets as W",
        "def shown(x):\n    print('before')\n    1 / 0\nW.interact(shown, x=3);",
        "out = W.Output()\nwith out:\n    raise KeyError('gone')\nout.clear_output()",
        "t = threading.Thread(target=lambda: [][1])\nt.start()\nt.join()",
        "import sys\nprint('all is well')",
        "sys.exit(0)",
    )
    write(books, "03_dead", "print('alive')", "import os\nos._exit(1)", "print('never')")
    write(books, "04_bands", RECORDS_ITS_PROCESS)
    bands = {
        "00_good": {"knn": {"min": 0.2, "max": 0.3}, "blocks": {"min": 0.1}},
        "04_bands": {"missing": {"min": 0}, "pid": {"max": 1}},
    }
    (root / "tests").mkdir()
    (root / "tests" / "bands.json").write_text(json.dumps(bands))
    kernel = root / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(
        json.dumps({"argv": ["/bin/false"], "display_name": "broken", "language": "python"})
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(root / "jupyter"))
        summary = runner.run_course(books, root / "out", timeout=120)
    return root, summary


def problems(run, name):
    return run[1]["notebooks"][name]["problems"]


def test_a_good_notebook_is_ok_although_others_fail(run):
    statuses = {name: entry["status"] for name, entry in run[1]["notebooks"].items()}
    assert statuses.pop("00_good") == "ok"
    assert len(statuses) == 4 and set(statuses.values()) == {"failed"}
    assert problems(run, "00_good") == []


def test_the_kernel_is_this_interpreter_with_the_broken_kernel_first_in_line(run):
    assert streams(code_cells(run[0] / "out" / "00_good.ipynb")[1]) == f"cpu 3 {sys.executable}\n"


def test_recorded_values_reach_the_summary_on_disk(run):
    saved = json.loads((run[0] / "out" / "summary.json").read_text())
    assert saved == run[1]
    entry = saved["notebooks"]["00_good"]
    assert entry["metrics"]["knn"] == 0.25 and entry["metrics"]["blocks"] == [0.1, 0.2, 0.4]
    assert entry["title"] == "What is 00_good?" and entry["seconds"] > 0
    assert sys.platform != "linux" or entry["peak_memory_mb"] > 10


def test_each_notebook_has_a_process_of_its_own(run):
    entries = run[1]["notebooks"]
    pids = {entries[name]["metrics"]["pid"] for name in ("00_good", "04_bands")}
    assert len(pids) == 2 and os.getpid() not in pids


def test_the_summary_names_the_machine_in_kind_only(run):
    facts = run[1]["machine"]
    assert facts["cores"] == os.cpu_count() and facts["torch"] == torch.__version__.split("+")[0]
    assert os.uname().nodename not in json.dumps(facts)


def test_a_failing_cell_is_named_with_its_first_line_and_error(run):
    assert problems(run, "01_bad") == ["01_bad, cell 2 (foo = x # <b>): ValueError: no such thing"]
    assert [c.execution_count for c in code_cells(run[0] / "out" / "01_bad.ipynb")] == [1, 2, None]


def test_errors_that_papermill_misses_are_found(run):
    shown, cleared, thread, leaving = problems(run, "02_hidden")
    assert shown == (
        "02_hidden, cell 2 (def shown(x):): ZeroDivisionError: division by zero (inside a widget)"
    )
    assert cleared.startswith("02_hidden, cell 3 (out = W.Output()): KeyError: 'gone'")
    assert thread.startswith("02_hidden, cell 4") and "IndexError: list index" in thread
    assert leaving == "02_hidden, cell 6 (sys.exit(0)): SystemExit: 0"


def test_a_dead_kernel_is_named_and_what_ran_before_is_kept(run):
    assert problems(run, "03_dead")[0].startswith("03_dead, cell 2 (import os): DeadKernelError")
    assert streams(code_cells(run[0] / "out" / "03_dead.ipynb")[0]) == "alive\n"


def test_a_cell_that_takes_too_long_is_stopped_and_named(tmp_path):
    write(tmp_path / "notebooks", "00_slow", "print('quick')", "import time\ntime.sleep(600)")
    start = time.monotonic()
    summary = runner.run_course(tmp_path / "notebooks", tmp_path / "out", timeout=5)
    assert time.monotonic() - start < 300
    assert summary["notebooks"]["00_slow"]["problems"] == [
        "00_slow, cell 2 (import time): TimeoutError: the cell took longer than 5 s"
    ]
    assert streams(code_cells(tmp_path / "out" / "00_slow.ipynb")[0]) == "quick\n"


def test_bands_beside_the_notebooks_are_compared_and_missing_values_fail(run):
    missing, outside = problems(run, "04_bands")
    assert missing == "04_bands: missing was not recorded"
    assert re.fullmatch(r"04_bands: pid is \d+, outside its band −∞ … 1", outside)


def test_saved_notebooks_hold_no_widget_state_times_or_injected_cells(run):
    text = (run[0] / "out" / "00_good.ipynb").read_text()
    for word in ("widget-state", "widget-view", "papermill", "iopub", "injected"):
        assert word not in text
    cells = code_cells(run[0] / "out" / "00_good.ipynb")
    assert len(cells) == 5 and [c.execution_count for c in cells] == [1, 2, 3, 4, 5]
    panels = [o.data["text/plain"] for o in cells[3].outputs if "data" in o]
    assert panels == ["[interactive panel: run this cell to use it]"], "one panel, no bar"


def test_pages_open_without_a_network_and_show_figures_and_problems(run):
    out = run[0] / "out"
    for page in out.glob("*.html"):
        html = page.read_text()
        assert not re.search(
            r"""(src|href)=["']?(https?:)?//|url\(["']?http|@import|<script""", html
        )
    index = (out / "index.html").read_text()
    png = next(o.data["image/png"] for o in code_cells(out / "00_good.ipynb")[4].outputs)
    assert f"data:image/png;base64,{png.strip()}" in index
    assert "01_bad, cell 2 (foo = x # &lt;b&gt;): ValueError" in index and "# <b>" not in index
    for link in re.findall(r'href="([^"#]+)"', index):
        assert (out / link).is_file()
    assert len(re.findall(r'href="([^"#]+)"', index)) == 2 * 5


def test_the_words_for_a_figure_reach_the_notebook_and_its_page(run):
    out = run[0] / "out"
    (figure,) = (o for o in code_cells(out / "00_good.ipynb")[4].outputs if "data" in o)
    words = figure.metadata["image/png"]["alt"]
    assert words.startswith("Votes <b>; curve “a” from 25% at 1 to 50% at 2")
    assert 'alt="Votes &lt;b&gt;; curve' in (out / "00_good.html").read_text()


def test_names_of_users_are_text_on_the_index(run, tmp_path):
    evil = "<script>x</script>"
    entry = run[1]["notebooks"]["00_good"] | {"title": evil, "problems": [evil], "preset": evil}
    entry["metrics"] = {evil: evil}
    notebook = nbformat.read(run[0] / "out" / "00_good.ipynb", as_version=4)
    notebook.cells[0].source = f"# {evil}"
    name = "a <b> & ?#"
    nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    write_index(tmp_path, {"machine": {"system": evil}, "notebooks": {name: entry}})
    page = (tmp_path / "index.html").read_text()
    assert "<script" not in page and page.count("&lt;script&gt;x&lt;/script&gt;") >= 7
    assert "<b>" not in page and 'href="a%20%3Cb%3E%20%26%20%3F%23.html"' in page


def test_the_table_lists_time_status_figures_and_problems(run):
    table = runner.table(run[1])
    assert re.search(r"^00_good +\d+:\d\d  ok +pid \d+, knn 0.25, blocks 0.1 → 0.4$", table, re.M)
    assert re.search(r"^01_bad +\d+:\d\d  failed$", table, re.M)
    assert problems(run, "01_bad")[0] in table


# ---------------------------------------------------------------- parameters


def test_presets_go_where_they_are_declared_and_settings_change_values(tmp_path, capsys):
    books, out = tmp_path / "notebooks", tmp_path / "out"
    write(books, "00_a", parameters('preset = "cpu"\nsteps = 3\nrate = 1.0'), "preset, steps, rate")
    write(books, "01_b", parameters("steps = 3\nrate = 1.0"), "raise ValueError(f'{steps} {rate}')")
    (tmp_path / "bands.json").write_text('{"00_a": {"never": {"min": 0}}}')
    summary = runner.run_course(
        books,
        out,
        preset="gpu",
        parameters={"steps": 5, "rate": 2},
        bands=tmp_path / "bands.json",
    )
    assert summary["notebooks"]["00_a"]["status"] == "ok", "bands hold for the cpu preset only"
    cells = code_cells(out / "00_a.ipynb")
    assert cells[2].outputs[0].data["text/plain"] == "('gpu', 5, 2)"
    # the injected cell does not count: the number is that of the notebook a reader opens
    assert summary["notebooks"]["01_b"]["problems"] == [
        "01_b, cell 2 (raise ValueError(f'{steps} {rate}')): ValueError: 5 2"
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parameters": {"stepps": 5}}, "00_a has no parameter 'stepps'; it knows preset, steps"),
        ({"parameters": {"steps": "many"}}, "00_a: the parameter steps is int .* not 'many'"),
        ({"preset": "tpu"}, "no preset 'tpu'; choose cpu or gpu"),
        ({"only": "00_aa"}, "no notebook '00_aa'; the nearest are 00_a"),
        ({"only": "bird"}, "no notebook 'bird'; the nearest are 01_birds"),
        ({"only": "7"}, "no notebook '7'; the nearest are 00_a, 01_birds"),
        ({"only": ","}, "names no notebook"),
        ({"timeout": 0}, "timeout must be above 0"),
        ({"write_back": True, "parameters": {"steps": 4}, "only": "0"}, "leave out --set"),
        ({"bands": "bands.json"}, "a band has min and max, or equals, not .*'low'"),
        ({"notebooks": "nowhere"}, "the notebooks folder .*nowhere does not exist"),
        ({"notebooks": "empty"}, "no notebooks in .*empty"),
        ({"notebooks": "broken"}, "00_x.ipynb is not a valid notebook"),
        ({"notebooks": "computed"}, "00_x: the parameter b must be a literal, not computed"),
        ({"notebooks": "syntax"}, "00_x: the parameters cell is no valid Python"),
        ({"out": "file"}, "cannot write to .*file: "),
        ({"out": "file/below"}, "cannot write to .*below: "),
        ({"out": "notebooks"}, "cannot go into the notebooks' own folder"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "notebooks", "00_a", parameters('preset = "cpu"\nsteps = 3'))
    write(tmp_path / "notebooks", "01_birds", parameters('preset = "cpu"\nsteps = 3'))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "00_x.ipynb").write_text('{"cells": ')
    write(tmp_path / "computed", "00_x", parameters("a = 1\nb = 2 * a"))
    write(tmp_path / "syntax", "00_x", parameters("a ="))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "bands.json").write_text('{"00_a": {"knn": {"low": 0}}}')
    before = {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}
    with pytest.raises((ValueError, OSError), match=message) as caught:
        runner.run_course(**({"out": "out"} | options))
    assert "\n" not in str(caught.value)
    assert {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")} == before


def test_no_permission_to_write_is_said_before_anything_runs(tmp_path, monkeypatch):
    write(tmp_path / "notebooks", "00_a", "1")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    # root may write everywhere, so the refusal is played
    monkeypatch.setattr(runner.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(execute, "execute", lambda *a, **k: pytest.fail("it ran"))
    with pytest.raises(PermissionError, match="cannot write to .*out: Permission denied"):
        runner.run_course(tmp_path / "notebooks", tmp_path / "out")


def test_numbers_and_names_select_notebooks(tmp_path):
    for name in ("00_tour", "03_knn", "03_more", "10_end"):
        write(tmp_path, name, "1")
    assert runner._select(tmp_path, None) == ["00_tour", "03_knn", "03_more", "10_end"]
    assert runner._select(tmp_path, "03") == ["03_knn", "03_more"]
    assert runner._select(tmp_path, ["10_end", "0"]) == ["00_tour", "10_end"]
    assert runner._select(tmp_path, "3, 10_end.ipynb") == ["03_knn", "03_more", "10_end"]


# ---------------------------------------------------------------- resuming


@pytest.fixture
def in_process(monkeypatch):
    """Cells run here, at once; what a kernel is needed for is looked at above."""

    def execute_here(notebook, **_):
        problems = []
        for cell in notebook.cells[1:]:
            try:
                exec(cell.source, {})
            except Exception as error:
                problems.append(execute.Problem(1, cell.source, repr(error)))
        return execute.Executed(notebook, 0.5, 0.5, 100, {}, problems)

    monkeypatch.setattr(execute, "execute", execute_here)


def touching(marker, text):
    return f"with open({str(marker)!r}, 'a') as file:\n    file.write({text!r})"


def test_resume_runs_only_what_failed_or_changed(tmp_path, in_process):
    books, out, ran = tmp_path / "notebooks", tmp_path / "out", tmp_path / "ran"
    write(books, "00_kept", touching(ran, "a"))
    write(books, "01_edited", touching(ran, "b"))
    write(books, "02_failed", touching(ran, "c"), f"assert {str(tmp_path)!r} == 'x'")
    runner.run_course(books, out)
    assert ran.read_text() == "abc"
    write(books, "01_edited", touching(ran, "B"))
    summary = runner.run_course(books, out, resume=True)
    assert ran.read_text() == "abcBc"
    statuses = [entry["status"] for entry in summary["notebooks"].values()]
    assert statuses == ["ok", "ok", "failed"] and summary["selected"] == list(summary["notebooks"])
    # a part of the course leaves the rest of the report; without resume, finished ones run again
    summary = runner.run_course(books, out, only="00")
    assert ran.read_text() == "abcBca"
    assert len(summary["notebooks"]) == 3 and summary["selected"] == ["00_kept"]
    # what is gone from the folder leaves the report
    (books / "02_failed.ipynb").unlink()
    assert len(runner.run_course(books, out, resume=True)["notebooks"]) == 2
    assert ran.read_text() == "abcBca"


def is_running(pid):
    """Whether a process lives; a zombie does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
def test_ctrl_c_keeps_what_is_finished_and_ends_the_kernel(tmp_path):
    books, pid = tmp_path / "notebooks", tmp_path / "pid"
    write(books, "00_done", "1 + 1")
    write(
        books,
        "01_long",
        f"import os, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))",
        "time.sleep(600)",
    )
    command = [sys.executable, "-m", "refiner", "course", "--notebooks", str(books)]
    with subprocess.Popen(
        [*command, "--out", str(tmp_path / "out")],
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(refiner.__file__).parent.parent,
        start_new_session=True,
        # Tests that run in the background of a shell ignore the signal, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        deadline = time.time() + 120
        while not (pid.exists() and pid.read_text()) and time.time() < deadline:
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "--resume" in errors and "Traceback" not in errors
    saved = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [(n, e["status"]) for n, e in saved["notebooks"].items()] == [("00_done", "ok")]
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]
    assert not is_running(int(pid.read_text()))


def test_the_estimate_uses_stated_and_past_times(tmp_path, capsys, in_process):
    books, out = tmp_path / "notebooks", tmp_path / "out"
    write(books, "00_a", "1", minutes_cpu=2)
    write(books, "01_b", "1", minutes_cpu=5)
    runner.run_course(books, out, only="00")
    assert "1 notebook, about 2:00" in capsys.readouterr().out
    past = json.loads((out / "summary.json").read_text())["notebooks"]["00_a"]["seconds"]
    job = runner._job(
        books,
        "00_a",
        preset="cpu",
        parameters={},
        before={"00_a": {"status": "ok", "preset": "cpu", "seconds": past}},
    )
    assert job.seconds == past < 120
    assert runner._job(books, "01_b", preset="cpu", parameters={}, before={}).seconds == 300
    assert [places.clock(s) for s in (7, 61.4, 3725)] == ["0:07", "1:01", "1:02:05"]


# ---------------------------------------------------------------- writing back


def test_write_back_stores_outputs_and_nothing_of_the_run(tmp_path, capsys):
    books, out = tmp_path / "notebooks", tmp_path / "out"
    write(
        books,
        "00_a",
        parameters('preset = "cpu"'),
        "import ipywidgets as W\nprint(preset)",
        "W.interact(lambda x: x, x=2);",
    )
    write(books, "01_path", "import os\nprint(os.path.abspath('x'))")
    write(books, "02_bad", "raise ValueError")
    before = nbformat.read(books / "00_a.ipynb", as_version=4)
    bad = (books / "02_bad.ipynb").read_bytes()
    runner.run_course(books, out, write_back=True)
    after = nbformat.read(books / "00_a.ipynb", as_version=4)
    assert [c.id for c in after.cells] == [c.id for c in before.cells]
    assert [c.source for c in after.cells] == [c.source for c in before.cells]
    measured = after.metadata["refiner"].pop("measured")
    assert after.metadata == before.metadata
    assert 0 < measured["seconds"] and measured["cores"] == os.cpu_count()
    assert sys.platform != "linux" or 0 < measured["processor_seconds"]
    assert [c.metadata for c in after.cells] == [c.metadata for c in before.cells]
    assert streams(after.cells[2]) == "cpu\n"
    assert [c.get("execution_count") for c in after.cells] == [None, 1, 2, 3]
    assert "widget-view" not in (books / "00_a.ipynb").read_text()
    assert (books / "02_bad.ipynb").read_bytes() == bad, "a failure is not published"
    warnings = capsys.readouterr().err
    assert "01_path shows a path of this machine: " in warnings and "00_a" not in warnings
    # the outputs of a finished run can be stored later, and again: the same bytes
    stored = (books / "00_a.ipynb").read_bytes()
    nbformat.write(before, books / "00_a.ipynb")
    runner.run_course(books, out, only="00", resume=True, write_back=True)
    assert (books / "00_a.ipynb").read_bytes() == stored


@pytest.mark.parametrize("timeout", [600, None])
def test_a_message_is_found_although_its_notice_was_lost(timeout, monkeypatch):
    """A notice is lost on purpose: a poll sleeps until its end, whatever comes meanwhile."""

    async def asks():
        context = zmq.asyncio.Context.instance()
        with context.socket(zmq.PAIR) as sender, context.socket(zmq.PAIR) as receiver:
            sender.connect(f"tcp://127.0.0.1:{receiver.bind_to_random_port('tcp://127.0.0.1')}")
            session, poll = Session(), receiver.poll
            channel = execute._Channel(receiver, session)
            with pytest.raises(Empty):
                await channel.get_msg(timeout=0.01)

            async def deaf(timeout=None, flags=zmq.POLLIN):
                await asyncio.sleep(3600 if timeout is None else timeout / 1000)
                return await poll(0)

            monkeypatch.setattr(receiver, "poll", deaf)
            waiting = asyncio.ensure_future(channel.get_msg(timeout=timeout))
            await asyncio.sleep(0)
            await sender.send_multipart(session.serialize(session.msg("execute_reply")))
            return await asyncio.wait_for(waiting, 60)

    monkeypatch.setattr(execute, "LOOK_MS", 20)
    assert asyncio.run(asks())["msg_type"] == "execute_reply"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("/home/me/x.py:3: UserWarning", ["/home/me/x.py"]),
        ("saved '/tmp/a b'", ["/tmp/a"]),
        ("C:\\Users\\me", ["C:\\Users\\me"]),
        ("runs/home/x, a/tmp/b, https://x.org/home/y, 3/4, </usr/x>", []),
        (f"{Path.home()}/x", [str(Path.home())]),
    ],
)
def test_paths_of_a_machine_are_told_from_other_text(text, found):
    output = nbformat.v4.new_output("stream", text=text)
    notebook = new_notebook(cells=[new_code_cell("", outputs=[output])])
    assert [p for p in execute.machine_paths(notebook) if p in found] == found
    assert found or not execute.machine_paths(notebook)


# ---------------------------------------------------------------- record and bands


def test_record_keeps_plain_values_and_shows_nothing_below_a_cell(monkeypatch):
    monkeypatch.delenv("REFINER_RECORD", raising=False)
    monkeypatch.setattr(runner, "RECORDED", {})
    tensor = torch.tensor([0.5, 1.0])
    assert course.record("list", tensor) is None
    for name, value in {"number": np.float32(0.5), "count": 3, "text": "a", "row": (1, 2)}.items():
        course.record(name, value)
    assert runner.RECORDED == {
        "list": [0.5, 1.0],
        "number": 0.5,
        "count": 3,
        "text": "a",
        "row": [1, 2],
    }
    json.dumps(runner.RECORDED)


def test_record_adds_to_the_runners_file(tmp_path, monkeypatch):
    monkeypatch.setenv("REFINER_RECORD", str(tmp_path / "recorded.json"))
    monkeypatch.setattr(runner, "RECORDED", {})
    course.record("a", 1)
    course.record("b", [0.5])
    course.record("a", 2)
    assert json.loads((tmp_path / "recorded.json").read_text()) == {"a": 2, "b": [0.5]}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("inf"),
        [1.0, float("-inf")],
        torch.tensor(float("nan")),
        None,
        {"a": 1},
        ["a"],
        [[1.0]],
        torch.zeros(2, 2),
    ],
)
def test_record_refuses_what_is_no_measurement(value, tmp_path, monkeypatch):
    monkeypatch.setenv("REFINER_RECORD", str(tmp_path / "recorded.json"))
    monkeypatch.setattr(runner, "RECORDED", {})
    with pytest.raises(ValueError, match=r"record\('knn'\)"):
        course.record("knn", value)
    assert not list(tmp_path.iterdir()) and not runner.RECORDED


@pytest.mark.parametrize(
    ("value", "band", "inside"),
    [
        (0.3, {"min": 0.3, "max": 0.3}, True),
        (0.31, {"min": 0.3, "max": 0.3}, False),
        (0.29, {"min": 0.3}, False),
        ([0.1, 0.5], {"min": 0.1, "max": 0.5}, True),
        ([0.1, 0.6], {"min": 0.1, "max": 0.5}, False),
        ([], {"min": 0.1}, False),
        ("cpu", {"equals": "cpu"}, True),
        ("gpu", {"equals": "cpu"}, False),
        ("0.3", {"min": 0.1}, False),
    ],
)
def test_bands(value, band, inside):
    assert (runner.outside_bands({"x": value}, {"x": band}) == []) == inside


# ---------------------------------------------------------------- exercises


def square(x):
    return x**2


def cases():
    return (torch.randn(3, 4),)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: None, "not solved yet"),
        (lambda x: (_ for _ in ()).throw(NotImplementedError), "not solved yet"),
        (lambda x: x.nothing, "raises AttributeError: 'Tensor' object has no attribute"),
        (lambda x: "four", "type str; a tensor"),
        (lambda x: x.sum(0), r"shape \[4\], not \[3, 4\]"),
        (lambda x: x**2 + (x == x.max()) * 0.1, r"is [\d.e+-]+ at \[\d, \d\] where .* is right"),
        (lambda x: x**2 * float("nan"), "holds NaN"),
        (lambda x: x.detach() ** 2, "gradient for tensor 1 .* is missing: is something detached"),
        (lambda x: x.detach() ** 2 + x - x.detach(), "the gradient for tensor 1 .* where .* right"),
    ],
)
def test_an_exercise_that_is_not_right_is_explained_and_replaced(answer, message, capsys):
    torch.manual_seed(0)
    assert course.check(answer, square, cases, name="square", gradient=True) is square
    printed = capsys.readouterr().out
    assert re.search(rf"^square: .*{message}.*The library's version is used below\.$", printed)


def test_a_right_answer_is_kept_even_if_it_changes_its_input(capsys):
    def in_place(x):
        return x.mul_(x)

    assert course.check(in_place, square, cases, name="square") is in_place
    assert capsys.readouterr().out == "square: solved ✓\n"
    answer = lambda x: x * x  # noqa: E731
    assert course.check(answer, square, cases, name="square", gradient=True) is answer


def test_several_results_arrays_and_cut_gradients_are_compared(capsys):
    def wanted(x, y):
        return x.detach() * y, np.arange(3)

    def make():
        return torch.randn(3), torch.randn(3)

    same = lambda x, y: [x.detach() * y, [0, 1, 2]]  # noqa: E731
    assert course.check(same, wanted, make, name="two", gradient=True) is same
    assert course.check(lambda x, y: same(x, y)[:1], wanted, make, name="two") is wanted
    assert "should hold 2 values" in capsys.readouterr().out
    wrong = lambda x, y: (same(x, y)[0], [0, 1, 3])  # noqa: E731
    assert course.check(wrong, wanted, make, name="two") is wanted
    assert "part 1 of the result is 3 at [2] where 2 is right" in capsys.readouterr().out
    leaky = lambda x, y: (x * y, np.arange(3))  # noqa: E731
    assert course.check(leaky, wanted, make, name="two", gradient=True) is wanted
    assert "gradient for tensor 1 of the arguments should not exist" in capsys.readouterr().out


def test_measured_results_come_by_name():
    from refiner.base.places import measured

    assert measured("refine_controls")["command"].startswith("python benchmarks/refine_controls")
    with pytest.raises(FileNotFoundError, match="refine_controls"):
        measured("nothing_like_it")
