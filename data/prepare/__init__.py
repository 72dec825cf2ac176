"""From a download or an archive to tokens in mapped memory."""
