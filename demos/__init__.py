"""The demo: a page with tabs, each a module of this package behind `dit_accel.demos.tab.Tab`."""
