"""The list of commands says what the commands say of themselves."""

import pytest

from octavo.cli.lazy import COMMANDS, command_named, registered


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_shows_the_first_sentence_of_each_command(name):
    assert COMMANDS[name].help == " ".join(command_named(name).help.split("\n\n")[0].split())


def test_every_command_is_listed():
    for name in COMMANDS:
        command_named(name)
    assert {command.name for command in registered.registered_commands} == set(COMMANDS)
