"""The commands of the command line, one module each.

A command's module has ``add_parser(commands)``, which adds its parser and sets ``run`` to a function that
takes the parsed options and returns the exit status. ``mulsched.cli`` lists the modules.
"""
