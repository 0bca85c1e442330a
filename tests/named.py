"""A suite that stops early still names what failed: pytest's summary comes at the end, which a run that is
killed never sees. Each failure is named when it happens; Ctrl-C and SIGTERM name what was running too."""

import signal

import pytest

LONGEST = 200  # characters of a reason


@pytest.hookimpl(trylast=True)  # after the reporter's own
def pytest_configure(config):
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if reporter is not None:  # an xdist worker has none: the process that started it hears of its tests
        config.pluginmanager.register(Named(reporter, in_full=config.option.verbose > 0))
        signal.signal(signal.SIGTERM, ended)


def ended(number, frame):
    """To pytest as Ctrl-C is: it ends its workers and writes its summary."""
    signal.signal(number, signal.SIG_IGN)  # `timeout` and make send it twice
    raise KeyboardInterrupt(f"ended by {signal.Signals(number).name}")


class Named:
    """in_full: pytest names every test by itself, as it does with -v."""

    def __init__(self, reporter, in_full):
        self.reporter, self.in_full, self.running = reporter, in_full, []

    def pytest_runtest_logstart(self, nodeid):
        self.running.append(nodeid)

    def pytest_runtest_logfinish(self, nodeid):
        self.over(nodeid)

    @pytest.hookimpl(trylast=True)  # after its F
    def pytest_runtest_logreport(self, report):
        if report.when == "???":  # xdist's, of a test whose worker died
            self.over(report.nodeid)
        if report.failed:
            self.say(f"FAILED {report.nodeid} - {reason(report)}")

    def pytest_collectreport(self, report):
        if report.failed:
            self.say(f"ERROR {report.nodeid} - {reason(report)}")

    def pytest_keyboard_interrupt(self, excinfo):
        for nodeid in self.running:
            self.write(f"RUNNING {nodeid} - {excinfo.value or 'interrupted'}")

    def over(self, nodeid):
        if nodeid in self.running:
            self.running.remove(nodeid)

    def say(self, line):
        if not self.in_full:
            self.write(line)

    def write(self, line):
        self.reporter.ensure_newline()  # after the name of a file
        self.reporter.write(f"\n{line}\n", flush=True)  # or among dots


def reason(report) -> str:
    """In a line: what was raised, else the last of what is known."""
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = [crash.message] if crash else report.longreprtext.rstrip().splitlines()[-1:]
    return (lines or ["?"])[0].strip().partition("\n")[0][:LONGEST]
