"""The ops, one by one."""
