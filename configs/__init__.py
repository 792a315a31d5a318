"""Configuration: typed models, YAML loading, messages, and the runnable recipes beside this file."""
