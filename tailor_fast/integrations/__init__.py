"""tailor_fast inside other people's programs; each module imports only what it integrates with."""
