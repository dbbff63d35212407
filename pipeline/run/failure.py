"""The two ways in which a stage ends early, and the line that tells of an error of others."""


class RunFailed(Exception):
    """The run failed: one line that says what is wrong, where, and what to do. Exit status 1."""


class SettingsWrong(Exception):
    """The settings cannot be used, said before any worker or model starts. Exit status 2."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something, else the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
