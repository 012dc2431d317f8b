"""What people read is what was meant: names are not taken for markup or emoji codes."""

from ssl_kit.core.console import say, table, warn


def test_names_are_printed_as_they_are(capsys):
    say("mnist5k:train: [bold]4[/bold] images :smile:")
    warn("a:train: [x]")
    table("t", ["id"], [[":train: [red]a"]])
    printed = capsys.readouterr()
    assert "mnist5k:train: [bold]4[/bold] images :smile:" in printed.out and ":train: [red]a" in printed.out
    assert "a:train: [x]" in printed.err
