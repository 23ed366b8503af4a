from .command_line import join_host as join_host, main as main
