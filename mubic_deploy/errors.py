"""What a user can get wrong, said in one line."""


class UserError(Exception):
    """Wrong input, file or setting. The message is one line: what is wrong, with the value, and what to do.

    The command line prints it and exits with code 2; the API raises it."""
