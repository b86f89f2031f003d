"""What every other package stands on: input checks, backend choice, errors, the environment.

Imports torch and nothing else of the project.
"""
