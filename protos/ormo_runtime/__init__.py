"""What both programs stand on: settings, the log, signals, certificates, channels, timeouts, and their process."""
