"""The one exception for what a user can put right."""


class UserError(Exception):
    """Wrong input: one sentence that says what is wrong, where, and what to do.

    `agreed` is set where all ranks raise the same error together, so that rank 0 alone prints it.
    """

    agreed = False
