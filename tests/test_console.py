import io
from itertools import count

import pytest
from rich.table import Table

from dsakv.console import LINE_EVERY, Console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_data_and_log_go_separate_ways() -> None:
    out, err = io.StringIO(), io.StringIO()
    console = Console(out, err)
    console.print_data("[bold]x[/bold] " + "y" * 300)
    console.print_data("tok", end="")
    console.info("[red]a[/red] :smile: " + "z" * 300)
    console.warn("careful")
    assert out.getvalue() == "[bold]x[/bold] " + "y" * 300 + "\ntok"
    assert err.getvalue() == "[red]a[/red] :smile: " + "z" * 300 + "\nwarning: careful\n"


def test_generated_text_cannot_steer_a_terminal() -> None:
    text = "a\x1b[2Jb\a\tc\n"
    pipe, screen = io.StringIO(), Terminal()
    Console(pipe, io.StringIO()).print_model_text(text)
    Console(screen, io.StringIO()).print_model_text(text)
    assert pipe.getvalue() == text
    assert screen.getvalue() == "a\ufffd[2Jb\ufffd\tc\n"


def test_tables_go_to_stdout() -> None:
    out, err = io.StringIO(), io.StringIO()
    table = Table("name", "value")
    table.add_row("hit rate", "0.5")
    table.add_row("[/a path]", "[red]x")
    Console(out, err).print_table(table)
    assert "hit rate" in out.getvalue()
    assert "[/a path]" in out.getvalue()
    assert "[red]x" in out.getvalue()
    assert "\x1b" not in out.getvalue()
    assert err.getvalue() == ""


def test_progress_lines_are_rare_and_end_with_the_whole() -> None:
    err, clock = io.StringIO(), Clock()
    with Console(io.StringIO(), err, clock).progress(60, "decode", "tokens") as advance:
        for _ in range(60):
            clock.now += 0.5
            advance(1)
    lines = err.getvalue().splitlines()
    assert lines == [
        "decode: 20/60 tokens (10 s, 2.0 tokens/s, 20 s left)",
        "decode: 40/60 tokens (20 s, 2.0 tokens/s, 10 s left)",
        "decode: 60/60 tokens (30 s, 2.0 tokens/s)",
    ]


@pytest.mark.parametrize(("done", "line"), [(0, "read: 0 records (0 s)"), (7, "read: 7 records (4 s, 1.8 records/s)")])
def test_progress_without_a_total(done: int, line: str) -> None:
    err, clock = io.StringIO(), Clock()
    with Console(io.StringIO(), err, clock).progress(None, "read", "records") as advance:
        if done:
            clock.now += 4
            advance(done)
    assert err.getvalue() == line + "\n"


def test_progress_that_breaks_off_claims_no_end() -> None:
    err = io.StringIO()

    def work() -> None:
        with Console(io.StringIO(), err, Clock()).progress(3, "read", "files") as advance:
            advance(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert err.getvalue() == ""


def test_progress_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out, err = io.StringIO(), Terminal()
    ticks = count(0.0, LINE_EVERY)
    console = Console(out, err, lambda: next(ticks))
    with console.progress(4, "prefill", "tokens") as advance:
        advance(2)
        console.info("half way")
        advance(2)
    text = err.getvalue()
    assert "prefill" in text
    assert "4/4" in text
    assert "tokens/s" in text
    assert "half way" in text
    assert out.getvalue() == ""
