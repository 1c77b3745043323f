"""The `lengthtrack` command, run in this process."""

from click.testing import CliRunner, Result

from samplers.cli.commands import main


def run(*arguments: object, status: int = 0) -> Result:
    """Run the command with these arguments; its exit status must be this one."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="lengthtrack")
    assert result.exit_code == status, result.output
    return result
