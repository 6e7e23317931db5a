"""Pictures and checkpoints from outside: `deepseek_vl2.utils.io`."""
