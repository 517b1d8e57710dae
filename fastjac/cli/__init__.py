"""What stands behind the ``fastjac`` command."""
