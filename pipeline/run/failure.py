"""The two ways in which a stage ends early."""


class RunFailed(Exception):
    """The run failed: one line that says what is wrong, where, and what to do. Exit status 1."""


class SettingsWrong(Exception):
    """The settings cannot be used, said before any worker or model starts. Exit status 2."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems
