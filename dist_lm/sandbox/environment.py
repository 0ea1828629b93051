"""Environment variables of programs.

This module runs inside the sandbox, which has the standard library only.
"""

PATH = "/usr/local/bin:/usr/bin:/bin"
ENVIRONMENT = {"PATH": PATH, "HOME": "/tmp", "LC_ALL": "C.UTF-8", "TZ": "UTC", "TMPDIR": "/tmp"}
