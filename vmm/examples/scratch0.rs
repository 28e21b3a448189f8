use forkd_vmm::{channel::*, kvm::*, memory::*, process::*};
use std::fs::File;
use std::io::*;
use std::os::fd::*;
use std::os::unix::net::*;
use std::time::*;
fn main() {
    let z = Zygote::start().unwrap();
    let t0 = Instant::now();
    let args: Vec<String> = std::env::args().collect();
    let kernel = File::open(&args[1]).unwrap();
    let rootfs = File::open(&args[2]).unwrap();
    let layout = MemoryLayout::new(512, rootfs.metadata().unwrap().len()).unwrap();
    let ram = create_image("ram", layout.ram_bytes()).unwrap();
    let console = File::create("/tmp/console.log").unwrap();
    let _ = std::fs::remove_file("/tmp/vs.sock");
    let l = UnixListener::bind("/tmp/vs.sock").unwrap();
    let spec = MachineSpec {
        layout,
        kind: KvmKind::detect(),
        record: vec![],
        start: Start::Boot { command_line: args.get(3).cloned().unwrap_or_default() },
    };
    let p = z
        .spawn(
            &spec,
            &MachineFiles {
                images: vec![ram.as_fd(), rootfs.as_fd()],
                start: kernel.as_fd(),
                console: console.as_fd(),
                vsock: l.as_fd(),
            },
        )
        .unwrap();
    println!("pid {}", p.pid);
    loop {
        match p.channel.receive::<Report>() {
            Ok((r, fds)) => {
                println!("{:?} {:?} fds {}", t0.elapsed(), r, fds.len());
                if let Report::Rang { ring: forkd_vmm::devices::doorbell::Ring::Booted, .. } = r {
                    let args = args.clone();
                    std::thread::spawn(move || {
                        std::thread::sleep(Duration::from_secs(
                            args.get(4).and_then(|x| x.parse().ok()).unwrap_or(20),
                        ));
                        println!("{:?} connecting", t0.elapsed());
                        let mut c = 0u32;
                        println!("{:?} {:?}", t0.elapsed(), c);
                        let mut c = 0u32;
                        println!("{:?} {:?}", t0.elapsed(), c);
                        let mut c = 0u32;
                        println!("{:?} {:?}", t0.elapsed(), c);
                    });
                }
                if matches!(r, Report::Snapshot) {
                    // fork children from it
                    let vs = File::from(fds.into_iter().next().unwrap());
                    for i in 0..3 {
                        let t = Instant::now();
                        let path = format!("/tmp/vs{i}.sock");
                        let _ = std::fs::remove_file(&path);
                        let l = UnixListener::bind(&path).unwrap();
                        let mut rec = vec![0u8; 512];
                        rec[..4].copy_from_slice(&0x464b4752u32.to_le_bytes());
                        rec[4] = 1;
                        rec[8] = 1 + i as u8;
                        rec[16..24].copy_from_slice(
                            &(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64)
                                .to_le_bytes(),
                        );
                        for b in rec[24..88].iter_mut() {
                            *b = i as u8 * 7 + 1
                        }
                        rec[88] = 5;
                        rec[92..97].copy_from_slice(format!("kid-{i}").as_bytes());
                        let console = File::create(format!("/tmp/console{i}.log")).unwrap();
                        let spec = MachineSpec {
                            layout,
                            kind: KvmKind::detect(),
                            record: rec,
                            start: Start::Restore { lazy: false, zero_runs: vec![] },
                        };
                        let p = z
                            .spawn(
                                &spec,
                                &MachineFiles {
                                    images: vec![ram.as_fd(), rootfs.as_fd()],
                                    start: vs.as_fd(),
                                    console: console.as_fd(),
                                    vsock: l.as_fd(),
                                },
                            )
                            .unwrap();
                        let spawned = t.elapsed();
                        loop {
                            let r = p.channel.receive::<Report>().map(|x| x.0);
                            println!("  child {i} spawned {spawned:?} {:?} {:?}", t.elapsed(), r);
                            match r {
                                Ok(Report::Rang {
                                    ring: forkd_vmm::devices::doorbell::Ring::Ready, ..
                                }) => break,
                                Ok(Report::Rang { .. }) => {}
                                _ => break,
                            }
                        }
                        let mut c = 0u32;
                        println!("{:?} {:?}", t.elapsed(), c);
                        println!("{:?}", t.elapsed());
                        let mut c = 0u32;
                        println!("{:?} {:?}", t.elapsed(), c);
                        println!("{:?}", t.elapsed());
                    }
                    break;
                }
            }
            Err(e) => {
                println!("{e:?}");
                break;
            }
        }
    }
}
