"""What reaches a user and what goes to the log, in processes of their own: file descriptors are at stake."""

import os
import subprocess
import sys
import termios

import pytest

CHATTER = """
import logging, os, sys, warnings
from pathlib import Path
from softlabel.terminal import log_to, progress, say
say("before")
with log_to(Path(sys.argv[1])):
    say("for the user")
    print("a library prints")
    sys.stderr.write("a library complains\\n")
    os.write(1, b"C++ prints\\n")
    os.write(2, b"C++ complains\\n")
    warnings.warn("a warning")
    logging.getLogger("a.library").warning("a log line")
    for _ in progress(range(3), desc="work", unit="tile"):
        pass
    logging.getLogger("a.handler").addHandler(logging.StreamHandler())
    FAILURE
logging.getLogger("a.handler").warning("later")
print("after")
os.write(2, b"after, too\\n")
"""


def run(tmp_path, failure="pass"):
    log = tmp_path / "run" / "softlabel.log"
    command = [sys.executable, "-c", CHATTER.replace("FAILURE", failure), str(log)]
    return subprocess.run(command, capture_output=True, text=True), log


def test_our_lines_reach_the_user_and_all_else_the_log(tmp_path):
    found, log = run(tmp_path)
    assert found.returncode == 0 and found.stdout == "before\nfor the user\nafter\n"
    *progress, last = found.stderr.splitlines()
    assert last == "after, too" and [line.split(" [")[0] for line in progress] == ["work:   0% 0/3", "work: 100% 3/3"]
    logged = [
        "a library prints",
        "a library complains",
        "C++ prints",
        "C++ complains",
        "a warning",
        "a log line",
        "later",
    ]
    assert all(text in log.read_text() for text in logged)
    assert "for the user" not in log.read_text()


@pytest.mark.parametrize("failure", ["raise ValueError('a defect')", "raise KeyboardInterrupt"])
def test_what_ends_the_run_is_on_the_terminal(tmp_path, failure):
    found, log = run(tmp_path, failure)
    assert found.returncode != 0 and "Traceback" in found.stderr and failure.split()[1].split("(")[0] in found.stderr
    assert "Traceback" not in log.read_text()


def test_a_log_is_appended_to(tmp_path):
    for _ in range(2):
        _, log = run(tmp_path)
    assert log.read_text().count("C++ prints") == 2


LONG = """
from softlabel import terminal
terminal._LINE_S = 0.05
import time
bar = terminal.progress(total=40, desc="work")
for i in range(40):
    time.sleep(0.005)
    bar.set_postfix_str(f"now {i}", refresh=False)
    bar.update()
    if i == 20:
        terminal.say("a word between")
time.sleep(0.1)
bar.close()
"""


def test_progress_without_a_terminal_is_a_line_now_and_then():
    process = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True)
    found = process.stderr
    lines = found.splitlines()
    assert "\r" not in found and all(line.startswith("work: ") for line in lines)
    counts = [line.split(" [")[0] for line in lines]
    assert 3 <= len(lines) <= 9 and len(set(counts)) == len(counts) and process.stdout == "a word between\n"
    assert "40/40" in lines[-1] and "40/40" not in lines[-2]


def test_progress_on_a_terminal_is_a_bar():
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    process = subprocess.Popen([sys.executable, "-c", LONG], stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # how a pseudo-terminal says that nobody is at its other end any more
        pass
    os.close(ours)
    assert process.wait() == 0 and shown.count(b"\rwork:") > 1 and b"100%|" in shown
