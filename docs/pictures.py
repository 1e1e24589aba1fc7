"""The pictures of the site, drawn while it is built. `![...](pictures/NAME.svg)` in a page shows the function NAME."""

from __future__ import annotations
