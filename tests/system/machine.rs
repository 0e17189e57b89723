//! The image as a machine of its own: kernel, cloud-init that finds EC2, user-data, engines. In QEMU,
//! by software emulation, for which a minute is little.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::mount::{MsFlags, mount};

use crate::container::static_binary;
use crate::harness::command;
use crate::harness::metadata::Metadata;
use crate::harness::poll;
use crate::harness::scratch::Scratch;

const SOURCE: &str = env!("CARGO_MANIFEST_DIR");
/// A boot takes a minute on a machine that does nothing else.
const BOOT: Duration = Duration::from_mins(15);
/// What the machine says last.
const END: &str = "the machine has said everything";

/// What is run at the end of the first boot, to look at the machine over its serial console. The
/// image itself runs nothing.
const LOOK: &str = r#"
runcmd:
- |
  exec >/dev/ttyS0 2>&1
  export SYSTEMD_COLORS=0 SYSTEMD_URLIFY=0
  for try in $(seq 300); do
    docker info --format '{{json .RegistryConfig.Mirrors}}' | grep -q 5000 && break
    sleep 1
  done
  echo "cloud: $(cloud-id)"
  echo "mirrors: $(docker info --format '{{json .RegistryConfig.Mirrors}}')"
  echo "reloads: $(journalctl -b -u docker -o cat | grep -c 'Reloaded configuration')"
  echo "cycles: $(journalctl -b -o cat | grep -c 'ordering cycle')"
  echo "failed: $(systemctl list-units --failed --no-legend --plain | tr '\n' ';')"
  echo "times: $(systemctl show registry-agent --property=ExecMainStartTimestampMonotonic --property=ActiveEnterTimestampMonotonic | tr '\n' ' ')"
  systemctl status --no-pager --lines=0 registry-agent
  registry-agent status
  echo "the machine has said everything"
"#;

/// A machine, which is switched off on drop.
struct Machine {
    process: Child,
    console: PathBuf,
}

impl Machine {
    fn console(&self) -> String {
        let bytes = fs::read(&self.console).unwrap_or_default();
        String::from_utf8_lossy(&bytes).replace('\r', "")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// The roots of the machines, and of QEMU.
fn roots() -> PathBuf {
    let script = format!("{SOURCE}/tests/machine-image");
    PathBuf::from(command::run(&[&script]).trim())
}

/// Makes the disk of an image by the scripts of ami/, as packer runs them on an instance.
fn bake(scratch: &Scratch, roots: &Path) -> String {
    let root = scratch.folder("root");
    let lower = roots.join("machine");
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.display(),
        scratch.folder("upper"),
        scratch.folder("work")
    );
    let (kind, flags) = (Some("overlay"), MsFlags::empty());
    mount(kind, root.as_str(), kind, flags, Some(options.as_str())).expect("mounting an overlay");

    let binary = static_binary();
    let build = format!("{SOURCE}/packaging/build");
    let binary = binary.to_str().expect("a path in UTF-8");
    let packages = format!("{root}/opt/packages");
    command::run(&[
        &build, "--fast", "--binary", binary, "--output", &packages, "deb",
    ]);
    command::run(&[
        "cp",
        "--recursive",
        &format!("{SOURCE}/ami"),
        &format!("{root}/opt/"),
    ]);
    command::run(&[
        "sh",
        "-c",
        &format!("echo '/dev/vda / ext4 defaults 0 1' >{root}/etc/fstab"),
    ]);
    // A minimal root has no locales to make one of, which Debian's own cloud images have.
    command::run(&[
        "sh",
        "-c",
        &format!("echo 'locale: false' >{root}/etc/cloud/cloud.cfg.d/90-test.cfg"),
    ]);
    let inside = |argv: &[&str]| {
        let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        let enter = [
            "chroot",
            &root,
            "env",
            "--ignore-environment",
            path,
            "LANG=C.UTF-8",
        ];
        command::run(&[&enter, argv].concat());
    };
    let script = |name: &str| format!("/opt/ami/provision/{name}.sh");
    inside(&["PACKAGES=/opt/packages", &script("install")]);
    for step in ["harden", "clean", "validate"] {
        inside(&[&script(step)]);
    }
    command::run(&["rm", "-r", &packages, &format!("{root}/opt/ami")]);

    let disk = scratch.at("disk.img");
    command::run(&["mke2fs", "-q", "-t", "ext4", "-d", &root, &disk, "4G"]);
    disk
}

/// Switches a machine on, whose only network is the metadata server.
fn boot(scratch: &Scratch, roots: &Path, disk: &str, metadata: &Metadata) -> Machine {
    let qemu = roots.join("qemu");
    let at = |path: &str| qemu.join(path).display().to_string();
    let boot = roots.join("machine/boot");
    let newest = |prefix: &str| {
        let entries = fs::read_dir(&boot).expect("a kernel's folder").flatten();
        let mut found = entries.map(|entry| entry.path());
        let found = found.find(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with(prefix)
        });
        found.expect("a kernel").display().to_string()
    };
    let library = "usr/lib/x86_64-linux-gnu";
    let libraries = format!("{}:{}/pulseaudio", at(library), at(library));
    let console = scratch.path().join("console");
    let uuid = "ec2e1916-9099-7caf-fd21-012345abcdef";
    let network = format!(
        "user,id=net,net=169.254.0.0/16,dhcpstart=169.254.10.10,host=169.254.0.2,dns=169.254.0.3,\
         restrict=on,guestfwd=tcp:169.254.169.254:80-cmd:socat - TCP4:{}",
        metadata.address()
    );
    // By its own loader and libraries: this machine need not have any of them.
    let process = Command::new(at("lib64/ld-linux-x86-64.so.2"))
        .args([
            "--library-path",
            &libraries,
            &at("usr/bin/qemu-system-x86_64"),
        ])
        .args(["-L", &at("usr/share/qemu"), "-L", &at("usr/share/seabios")])
        .env("QEMU_MODULE_DIR", at(&format!("{library}/qemu")))
        .args([
            "-machine",
            "q35",
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "max",
        ])
        .args([
            "-vga",
            "none",
            "-smp",
            "2",
            "-m",
            "2048",
            "-display",
            "none",
            "-monitor",
            "none",
            "-no-reboot",
        ])
        .args([
            "-kernel",
            &newest("vmlinuz"),
            "-initrd",
            &newest("initrd.img"),
        ])
        .args([
            "-append",
            "root=/dev/vda rw console=ttyS0 panic=-1 net.ifnames=0 SYSTEMD_COLORS=0",
        ])
        .args([
            "-drive",
            &format!("file={disk},format=raw,if=virtio,cache=unsafe"),
        ])
        .args([
            "-smbios",
            &format!("type=1,manufacturer=Amazon EC2,uuid={uuid},serial={uuid}"),
        ])
        .args([
            "-netdev",
            &network,
            "-device",
            "virtio-net-pci,netdev=net,romfile=",
        ])
        .args(["-serial", &format!("file:{}", console.display())])
        .stdin(Stdio::null())
        .spawn()
        .expect("starting QEMU");
    Machine { process, console }
}

#[test]
fn the_image_boots_on_ec2_and_wires_docker_before_its_first_pull() {
    let roots = roots();
    let scratch = Scratch::new("machine");
    let mirror = fs::read_to_string(format!("{SOURCE}/cloud-init/mirror.yaml"));
    let metadata = Metadata::start(&(mirror.expect("mirror.yaml") + LOOK));
    let disk = bake(&scratch, &roots);
    let mut machine = boot(&scratch, &roots, &disk, &metadata);
    let said = poll::within(BOOT, || {
        let console = machine.console();
        // One that has ended says nothing more.
        let ended = machine
            .process
            .try_wait()
            .is_ok_and(|ended| ended.is_some());
        if console.contains(END) || ended {
            Ok(console)
        } else {
            Err(console)
        }
    });
    let said = said.unwrap_or_else(|console| panic!("not within {BOOT:?}: {console}"));

    for words in [
        END,
        "cloud: aws",
        "mirrors: [\"http://127.0.0.1:5000/\"]",
        // It had it when it started.
        "reloads: 0",
        "cycles: 0",
        "failed: \n",
        "Active: active (running)",
        "ready      yes",
    ] {
        assert!(said.contains(words), "no `{words}` on the console:\n{said}");
    }
    assert!(!said.contains("[FAILED]"), "{said}");
    assert_eq!(metadata.refused(), Vec::<String>::new(), "by IMDSv2 alone");
    let times = said.lines().find(|line| line.starts_with("times: "));
    let times = times.expect("the times").split(['=', ' ']);
    let times: Vec<u64> = times.filter_map(|word| word.parse().ok()).collect();
    let (first, last) = (times.iter().min(), times.iter().max());
    if let (Some(first), Some(last)) = (first, last) {
        println!(
            "from power on to ready: {last} µs, of it the agent's: {} µs",
            last - first
        );
    }
}
