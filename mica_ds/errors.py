"""The exceptions that end a run in good order: what a user can put right, and a scheduler's wish."""


class UserError(Exception):
    """Wrong input: one sentence that says what is wrong, where, and what to do.

    `agreed` says that all ranks raise the same error together, so that rank 0 alone prints it.
    """

    def __init__(self, message: str, agreed: bool = False) -> None:
        super().__init__(message)
        self.agreed = agreed


class Preempted(KeyboardInterrupt):
    """SIGTERM or SIGUSR1: the machine is wanted back, and the same command goes on later.

    Not an Exception: nothing that handles failures may take it for one. `agreed` as in `UserError`.
    """

    def __init__(self, message: str, agreed: bool = False) -> None:
        super().__init__(message)
        self.agreed = agreed
