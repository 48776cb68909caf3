"""The published architectures: one folder with a `config.json` each, made by `configuration.make_configs`."""
