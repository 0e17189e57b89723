# Images for Amazon EC2 with registry-agent in them, of Debian 12 and Amazon Linux 2023, for x86_64
# and arm64:
#
#   packaging/build                       # on a machine of each architecture
#   packer init ami && packer build ami   # or: -only='*.debian-x86_64'
#
# One image is for all roles: what an instance does is in its user-data (cloud-init/).

packer {
  required_version = ">= 1.6.6"
  required_plugins {
    amazon = {
      source  = "github.com/hashicorp/amazon"
      version = ">= 1.2.0"
    }
  }
}

variable "region" {
  type    = string
  default = "us-east-1"
}

variable "packages" {
  type        = string
  default     = "target/packages"
  description = "The folder with the .deb and .rpm files."
}

variable "version" {
  type        = string
  default     = "0.1.0"
  description = "Named in the images' names and tags."
}

variable "kms_key_id" {
  type        = string
  default     = ""
  description = "The key of the encrypted volumes; without, the account's own for EBS."
}

locals {
  stamp = formatdate("YYYYMMDD-hhmm", timestamp())
}

source "amazon-ebs" "base" {
  region = var.region

  encrypt_boot = true
  kms_key_id   = var.kms_key_id

  # Instances of the image, and the one that makes it, give their credentials to IMDSv2 alone.
  imds_support = "v2.0"
  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }

  temporary_key_pair_type = "ed25519"
}

build {
  source "amazon-ebs.base" {
    name          = "debian-x86_64"
    instance_type = "t3.small"
    ssh_username  = "admin"
    ami_name      = "registry-agent-${var.version}-debian-12-x86_64-${local.stamp}"
    source_ami_filter {
      filters     = { name = "debian-12-amd64-*", virtualization-type = "hvm" }
      owners      = ["136693071363"] # Debian
      most_recent = true
    }
    tags = {
      Name           = "registry-agent"
      registry-agent = var.version
      base           = "debian-12"
      architecture   = "x86_64"
    }
  }

  source "amazon-ebs.base" {
    name          = "debian-arm64"
    instance_type = "t4g.small"
    ssh_username  = "admin"
    ami_name      = "registry-agent-${var.version}-debian-12-arm64-${local.stamp}"
    source_ami_filter {
      filters     = { name = "debian-12-arm64-*", virtualization-type = "hvm" }
      owners      = ["136693071363"]
      most_recent = true
    }
    tags = {
      Name           = "registry-agent"
      registry-agent = var.version
      base           = "debian-12"
      architecture   = "arm64"
    }
  }

  source "amazon-ebs.base" {
    name          = "amazon-x86_64"
    instance_type = "t3.small"
    ssh_username  = "ec2-user"
    ami_name      = "registry-agent-${var.version}-al2023-x86_64-${local.stamp}"
    source_ami_filter {
      filters     = { name = "al2023-ami-2023.*-x86_64", virtualization-type = "hvm" }
      owners      = ["amazon"]
      most_recent = true
    }
    tags = {
      Name           = "registry-agent"
      registry-agent = var.version
      base           = "al2023"
      architecture   = "x86_64"
    }
  }

  source "amazon-ebs.base" {
    name          = "amazon-arm64"
    instance_type = "t4g.small"
    ssh_username  = "ec2-user"
    ami_name      = "registry-agent-${var.version}-al2023-arm64-${local.stamp}"
    source_ami_filter {
      filters     = { name = "al2023-ami-2023.*-arm64", virtualization-type = "hvm" }
      owners      = ["amazon"]
      most_recent = true
    }
    tags = {
      Name           = "registry-agent"
      registry-agent = var.version
      base           = "al2023"
      architecture   = "arm64"
    }
  }

  # The base image's own first boot is over before anything is changed.
  provisioner "shell" {
    inline = ["cloud-init status --wait || true", "mkdir /tmp/registry-agent"]
  }
  provisioner "file" {
    source      = "${var.packages}/"
    destination = "/tmp/registry-agent"
  }
  provisioner "file" {
    source      = "${path.root}"
    destination = "/tmp"
  }
  # In one go: clean.sh takes away the key that another connection would need. /run is in memory,
  # so what is there is not in the image.
  provisioner "shell" {
    inline = [
      "sudo mv /tmp/ami /tmp/registry-agent /run/",
      "sudo sh -ec 'PACKAGES=/run/registry-agent bash /run/ami/provision/install.sh; for step in harden clean validate; do bash /run/ami/provision/$step.sh; done'",
    ]
  }
}
